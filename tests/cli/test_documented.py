"""docs/cli.md and docs/recipes.md name what exists: every command line is parsed. Every recipe key is documented."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from tunelab.cli.app import build_app
from tunelab.report.compare import recipe_keys

DOCS = Path(__file__).parents[2] / "docs"


def commands_of(name: str) -> list[str]:
    lines = (DOCS / name).read_text().splitlines()
    found = [line.split("  #")[0].strip() for line in lines if line.startswith("    tunelab ")]
    return [line for line in found if "[" not in line]


@pytest.mark.parametrize("line", [*commands_of("cli.md"), *commands_of("recipes.md")])
def test_command_lines_parse(line: str) -> None:
    """Each is a command with options it has; nothing is run."""
    words = shlex.split(line.split(" < ")[0].split(" | ")[0])[1:]
    command = typer.main.get_command(build_app())
    context = command.make_context("tunelab", list(words), resilient_parsing=False)
    while hasattr(context.command, "resolve_command"):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def test_every_recipe_key_is_documented() -> None:
    text = "".join((DOCS / name).read_text() for name in ("recipes.md", "adapters.md", "optimizers.md", "updates.md"))
    documented = set(re.findall(r"`(\w+)`", text))
    missing = {key for key in recipe_keys() if key.split(".")[-1] not in documented}
    assert missing <= {
        "optimizer.schedule." + key for key in ("min_lr_ratio", "timescale", "decay_ratio", "decay_type")
    }
