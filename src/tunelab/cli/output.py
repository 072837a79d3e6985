"""Results on stdout: one JSON object, or lines and tables that fit the terminal.

Colour follows NO_COLOR and FORCE_COLOR (which `--color` sets), else whether the stream is a terminal.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

SCHEMA_VERSION = 1
MIN_COLUMN = 6
"""A column is not shrunk below this to fit a terminal: fewer characters say nothing."""


def print_json(payload: Mapping[str, Any]) -> None:
    """The one JSON object of `--json`. Numbers JSON does not have (NaN, infinities) become null."""
    text = json.dumps(
        {"schema_version": SCHEMA_VERSION, **_finite(payload)}, indent=1, ensure_ascii=False, allow_nan=False
    )
    print_line(text)


def print_line(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Names and values in two columns; empty values are left out."""
    shown = {name: value for name, value in pairs.items() if value}
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        print_line(f"{paint(name.ljust(width), '2')}  {value}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table under its header, numbers to the right, no wider than the terminal (as wide as it is, when piped)."""
    header, *body = format_table(columns, rows, terminal_width())
    print_line(paint(header, "1"))
    for line in body:
        print_line(line)


def terminal_width() -> int | None:
    """Columns of the terminal on stdout, or None if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def paint(text: str, style: str, stream: TextIO | None = None) -> str:
    """`text` in an ANSI style (`31` red, `1` bold, `2` dim) where the stream shows colour."""
    return f"\x1b[{style}m{text}\x1b[0m" if has_colour(stream or sys.stdout) else text


def has_colour(stream: TextIO) -> bool:
    """Whether colour is wanted on `stream`."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Lines of a table, the header first. Where `width` is exceeded, the widest columns are cut with an ellipsis."""
    from rich.cells import cell_len

    table = [[" ".join(str(cell).split()) for cell in row] for row in (columns, *rows)]
    widths = [max(cell_len(row[i]) for row in table) for i in range(len(columns))]
    gaps = 2 * (len(columns) - 1)
    while width is not None and sum(widths) + gaps > width and max(widths) > MIN_COLUMN:
        widths[widths.index(max(widths))] -= 1
    right = [all(_is_number(row[i]) for row in table[1:] if row[i]) and len(table) > 1 for i in range(len(columns))]
    return [
        "  ".join(_fit(cell, w, r) for cell, w, r in zip(row, widths, right, strict=True)).rstrip() for row in table
    ]


def _fit(cell: str, width: int, right: bool) -> str:
    from rich.cells import cell_len, set_cell_size

    if cell_len(cell) > width:
        return set_cell_size(cell, width - 1) + "…"
    padding = " " * (width - cell_len(cell))
    return padding + cell if right else cell + padding


def _is_number(cell: str) -> bool:
    return cell[:1] in "+-−" + "0123456789" and any(c.isdigit() for c in cell) and cell.count(" ") < 3


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
