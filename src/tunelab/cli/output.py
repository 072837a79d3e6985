"""Results on stdout: one JSON object, or lines and tables that fit the terminal.

Colour follows NO_COLOR and FORCE_COLOR (which `--color` sets), else whether the stream is a terminal.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tunelab.cli.table import format_table

SCHEMA_VERSION = 1


def print_json(payload: Mapping[str, Any]) -> None:
    """The one JSON object of `--json`. Numbers JSON does not have (NaN, infinities) become null."""
    text = json.dumps(
        {"schema_version": SCHEMA_VERSION, **_finite(payload)}, indent=1, ensure_ascii=False, allow_nan=False
    )
    print_line(text)


def print_line(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")


def print_wrapped(text: str) -> None:
    """Text of several lines, broken between words to fit the terminal."""
    for line in text.splitlines():
        for part in wrap(line):
            print_line(part)


def wrap(line: str, indent: int = 0) -> list[str]:
    """A line as the lines it takes on the terminal, those after the first indented; as it is when piped."""
    width = terminal_width()
    if width is None or len(line) <= width:
        return [line]
    broken = textwrap.wrap(line, width, subsequent_indent=" " * indent, break_on_hyphens=False, drop_whitespace=True)
    return broken or [""]


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Names and values in two columns; empty values are left out."""
    shown = {name: value for name, value in pairs.items() if value}
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        print_line(f"{paint(name.ljust(width), '2')}  {value}")


def format_speed(cost: Mapping[str, Any]) -> str:
    """Of run.json's cost: tokens per second of training, and how much of the machine that uses, where it is known."""
    rate = cost.get("tokens_per_second")
    utilisation, ceiling = cost.get("utilisation"), cost.get("matmul_ceiling_flops_per_second")
    parts = [f"{rate:,.0f} tokens/s"] if rate else []
    if utilisation is not None and ceiling is not None:
        parts.append(f"{utilisation:.0%} of this machine's matmul ceiling ({ceiling / 1e9:,.0f} GFLOP/s)")
    return ", ".join(parts)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], droppable: Sequence[str] = ()) -> None:
    """A table under its header, no wider than the terminal (as wide as it is, when piped); see `format_table`."""
    header, *body = format_table(columns, rows, terminal_width(), droppable)
    print_line(paint(header, "1"))
    for line in body:
        print_line(line)


def format_interval(metric: Mapping[str, float], signed: bool = False) -> str:
    """`6.49 [6.46, 6.51]`: the value and its interval, to the digits the interval's width supports."""
    from tunelab.report import formatting

    least = 0 if abs(metric["value"]) >= 100 else 2
    decimals = formatting.decimals_for(metric["low"], metric["high"], least)
    form = formatting.signed if signed else formatting.fixed
    value, low, high = (form(metric[key], decimals) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


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


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
