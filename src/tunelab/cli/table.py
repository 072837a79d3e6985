"""Rows of text as aligned lines that fit a width. Pure; wide characters count as two columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

MIN_COLUMN = 6
"""A column is not cut below this to fit a terminal: fewer characters say nothing."""
GAP = "  "


def format_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, droppable: Sequence[str] = ()
) -> list[str]:
    """Lines of a table, the header first; columns of numbers to the right. `width` None is as wide as it gets.

    What is too wide loses the `droppable` columns one by one, the first first; then the widest columns are cut with an
    ellipsis.
    """
    table = [[" ".join(cell.split()) for cell in row] for row in (columns, *rows)]
    for name in droppable:
        if width is None or _total(_widths(table)) <= width:
            break
        dropped = table[0].index(name)
        table = [row[:dropped] + row[dropped + 1 :] for row in table]
    widths = _widths(table)
    while width is not None and _total(widths) > width and max(widths) > MIN_COLUMN:
        widths[widths.index(max(widths))] -= 1
    right = [all(_is_number(cell) for cell in column[1:] if cell) for column in zip(*table, strict=True)]
    return [GAP.join(_fit(*cell) for cell in zip(row, widths, right, strict=True)).rstrip() for row in table]


def _widths(table: Sequence[Sequence[str]]) -> list[int]:
    return [max(cell_len(cell) for cell in column) for column in zip(*table, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _fit(cell: str, width: int, right: bool) -> str:
    if cell_len(cell) > width:
        return set_cell_size(cell, width - 1) + "…"
    padding = " " * (width - cell_len(cell))
    return padding + cell if right else cell + padding


def _is_number(cell: str) -> bool:
    """Numbers, and what begins with one: intervals, durations, sizes."""
    return cell.lstrip("+-−")[:1].isdigit()
