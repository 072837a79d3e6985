"""`tunelab runs`: list, show, compare. Reads run folders; never torch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tunelab.cli.options import Json, Run, RunsDir
from tunelab.cli.output import print_json, print_line, print_pairs, print_table
from tunelab.errors import ConfigError, did_you_mean

HELP = """\b
Example: tunelab runs
Example: tunelab runs compare tiny-a tiny-b

The runs on disk: list (the default), show, compare.
"""


def list_(
    json: Json = False,
) -> None:
    """\b
    Example: tunelab runs
    """


def show(run: Run, runs_dir: RunsDir = "runs", json: Json = False) -> None:
    """\b
    Example: tunelab runs show tiny
    """


def compare(
    json: Json = False,
) -> None:
    """\b
    Example: tunelab runs compare tiny-a tiny-b
    """
