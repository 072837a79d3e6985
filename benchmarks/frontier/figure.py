"""The frontier as one plot: bytes per parameter against held-out loss, every arm named beside its point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tunelab.report import svg

BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b0588f"
INK, MUTED, RULE = "#17191c", "#5b626c", "#e2e4e8"
"""Okabe and Ito's, as the report's; families differ in shape too."""

LOOKS = {
    "full": ("Adam's kind, whole moments", BLUE, "o"),
    "lean": ("factored, shared or low-bit moments, or none", PURPLE, "s"),
    "part": ("low rank, or a part of the weights at a time", GREEN, "^"),
    "ours": ("ours", VERMILLION, "D"),
}
SIZE = (1080, 620)
REACH = range(7, 140, 4)
"""Distances of a label from its point that are tried, in points."""
NEAR = 11
"""No line is needed up to here."""
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class Point:
    """`excess`: of AdamW's loss, in percent; `low` and `high` over the seeds."""

    label: str
    family: str
    bytes: float
    excess: float
    low: float
    high: float


def draw_frontier(points: Sequence[Point], path: Path, title: str, most: float = 12.0) -> None:
    """Points above `most` percent are drawn at the upper edge, with their number in the label."""
    with svg.style(), matplotlib.rc_context({"svg.fonttype": "path", "axes.edgecolor": MUTED, "grid.color": RULE}):
        matplotlib.rcParams.update(
            {"axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED}
        )
        figure = Figure(figsize=(SIZE[0] / 72, SIZE[1] / 72), dpi=72, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_xlabel("bytes per parameter: weights, gradients at their peak, optimizer state")
        axes.set_ylabel("held-out loss above tuned AdamW's, %")
        axes.axhspan(-1, 1, color=BLUE, alpha=0.08, lw=0)
        axes.axvline(4, color=MUTED, lw=1, ls=(0, (4, 3)))
        shown = [(point, min(point.excess, most)) for point in points]
        for family, (name, colour, marker) in LOOKS.items():
            chosen = [(point, y) for point, y in shown if point.family == family]
            if not chosen:
                continue
            axes.errorbar(
                [point.bytes for point, _ in chosen],
                [y for _, y in chosen],
                yerr=[
                    [max(0.0, y - min(point.low, most)) for point, y in chosen],
                    [max(0.0, min(point.high, most) - y) for point, y in chosen],
                ],
                fmt=marker,
                color=colour,
                markersize=9 if family == "ours" else 6.5,
                lw=1,
                label=name,
                zorder=3,
            )
        axes.set_xlim(0, max(point.bytes for point in points) + 1.2)
        lowest = min(point.low for point in points)
        axes.set_ylim(min(-2.0, lowest - 0.7), max(y for _, y in shown) + 0.9)
        axes.legend(loc="upper right", frameon=False, fontsize=10)
        _write_labels(figure, axes, [(p.bytes, y, _text(p, most), LOOKS[p.family][1]) for p, y in shown])
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _text(point: Point, most: float) -> str:
    return point.label if point.excess <= most else f"{point.label} (+{point.excess:.0f}%)"


def _write_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Each label at the nearest free place around its point, with a line to it where that is far."""
    figure.draw_without_rendering()
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    taken = [axes.get_legend().get_window_extent(renderer)]
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
                fontsize=9.5,
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
