"""Labels beside the points of a plot, none over another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

REACH = range(7, 140, 4)
"""Distances of a label from its point that are tried, in points."""
NEAR = 11
"""No line is needed up to here."""
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def write_labels(
    figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str, str]], fontsize: float = 9.5
) -> None:
    """Each label at the nearest free place around its point, with a line to it where that is far.

    labels: (x, y, text, colour), in data units. Raises ValueError where there is no room.
    """
    figure.draw_without_rendering()
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    legend = axes.get_legend()
    taken = [] if legend is None else [legend.get_window_extent(renderer)]
    centres = [axes.transData.transform((x, y)) for x, y, _, _ in labels]
    taken += [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in centres]
    frame = axes.get_window_extent(renderer)
    for x, y, text, colour in sorted(labels):
        for reach, (dx, dy) in product(REACH, DIRECTIONS):
            note = axes.annotate(
                text,
                (x, y),
                xytext=(dx * reach, dy * reach),
                textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[dx],
                va={1: "bottom", 0: "center", -1: "top"}[dy],
                fontsize=fontsize,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colour} if reach > NEAR else None,
            )
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(1.5)  # without the line
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()
        else:
            raise ValueError(f"the plot has no room for the label {text}")
