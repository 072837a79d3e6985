"""From the repeats of two sides to medians, spreads and ratios. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

WARM_UP_STEPS = 1
"""Left out of the steady figures, kept in the seconds to N steps."""

LOSS_TOLERANCE = {"float32": 1e-4, "bf16": 2e-2}
"""Largest relative difference between the loss curves at which both sides count as having done the same work."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def steady_steps(num_steps: int) -> slice:
    """The steps that steady figures are of: all but the warm-up, or the last alone where there are no more."""
    return slice(min(WARM_UP_STEPS, num_steps - 1), num_steps)


def summarise_side(
    runs: Sequence[Mapping[str, Any]],
    *,
    real_tokens: Sequence[int],
    floors: Sequence[int],
    reference_floors: Sequence[int],
    batch_size: int,
) -> dict[str, Any]:
    """Every figure of one side over its repeats. `real_tokens` and the floors are per step, the same for both sides.

    `examples_per_second` is of the steady steps; `_all` adds their examples' share of a reference pass made before
    the first step, as an epoch pays it. `ceiling_share` is of the steady steps; `ceiling_share_to_n` of the whole,
    reference pass included. `cpu_share` is how much of its threads' time the process got: well below 1, the machine
    did other work as well.
    """
    steady = steady_steps(len(real_tokens))
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    for run in runs:
        steps = run["step_seconds"][steady]
        seconds, whole, ceiling = sum(steps), run["seconds_to_n"], run["ceiling"]["best"]
        note("examples_per_second", batch_size * len(steps) / seconds)
        reference = run["seconds"].get("reference", 0.0) * len(steps) / len(run["step_seconds"])
        note("examples_per_second_all", batch_size * len(steps) / (seconds + reference))
        note("tokens_per_second", sum(real_tokens[steady]) / seconds)
        note("step_seconds", statistics.median(steps))
        note("seconds_to_n", whole)
        note("reference_seconds", run["seconds"].get("reference", 0.0))
        note("ceiling_share", sum(floors[steady]) / seconds / ceiling)
        note("ceiling_share_to_n", (sum(floors) + sum(reference_floors)) / whole / ceiling)
        note("ceiling_flops", ceiling)
        note("peak_memory_bytes", peak_memory(run))
        note("cpu_share", run["cpu_share"])
        for name in ("cuda_allocated", "cuda_reserved"):
            if name in run["memory"]:
                note(name, run["memory"][name])
    return {name: spread(values) for name, values in figures.items()}


def peak_memory(run: Mapping[str, Any]) -> int:
    """Bytes: allocated on the card where there is one, else resident above the imports."""
    memory = run["memory"]
    return int(memory.get("cuda_allocated", memory["peak_above_imports"]))


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios above 1 say tunelab is faster, or takes more memory."""
    return {
        "examples_per_second": paired_ratio(ours, theirs, "examples_per_second"),
        "examples_per_second_all": paired_ratio(ours, theirs, "examples_per_second_all"),
        "step_seconds": paired_ratio(ours, theirs, "step_seconds", inverse=True),
        "seconds_to_n": paired_ratio(ours, theirs, "seconds_to_n", inverse=True),
        "peak_memory": paired_ratio(ours, theirs, "peak_memory_bytes"),
    }


def paired_ratio(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str, *, inverse: bool = False
) -> dict[str, Any]:
    """Ours / theirs (`inverse`: theirs / ours) of one figure.

    Each repeat of theirs is set against the mean of the two of ours around it, so that a machine that slows down
    slows both; the spread is over these pairs.
    """
    around = [(a + b) / 2 for a, b in pairwise(ours[name]["values"])]
    pairs = zip(around, theirs[name]["values"], strict=True)
    return spread([b / a if inverse else a / b for a, b in pairs])


def compare_losses(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], precision: str
) -> dict[str, Any]:
    """The curves of both sides' first repeats; a speed-up with another loss does not count (`agree` is False)."""
    mine, other = ours[0]["losses"], theirs[0]["losses"]
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(mine, other, strict=True)]
    tolerance = LOSS_TOLERANCE[precision]
    return {
        "ours": mine,
        "peer": other,
        "max_relative_difference": max(differences),
        "tolerance": tolerance,
        "agree": max(differences) <= tolerance,
        "repeats_agree": all(
            abs(a - b) <= tolerance * abs(b)
            for runs in (ours, theirs)
            for run in runs[1:]
            for a, b in zip(run["losses"], runs[0]["losses"], strict=True)
        ),
    }
