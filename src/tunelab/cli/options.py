"""Arguments and options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
RunsDir = Annotated[str, typer.Option("--runs-dir", metavar="FOLDER", help="Where runs are looked up by name.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run: its name, or its folder.", show_default=False)]
Recipe = Annotated[str | None, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.PATH=VALUE",
        help="Values that replace the recipe's, e.g. optimizer.learning_rate=1e-5.",
        show_default=False,
    ),
]


def words(recipe: str | None, overrides: list[str] | None) -> list[str]:
    """All positional arguments in their order; with --resume the first of them is no recipe."""
    return [] if recipe is None else [recipe, *(overrides or ())]
