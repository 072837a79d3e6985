"""From trials to the frontier: losses against AdamW's with the same seed, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.frontier.arms import ARMS
from benchmarks.frontier.figure import Point

Json = Mapping[str, Any]
REFERENCE = "adamw"
BUDGET, PARITY = 4.0, 1.0
"""Bytes per parameter, and percent of AdamW's loss: what the project asks of its own optimizer."""


def summarise(studies: Mapping[str, Json], untrained: float) -> list[dict[str, Any]]:
    """One row an arm, leanest first. `excess` is in percent of AdamW's loss with the same seed: over the seeds its
    mean, least and greatest; `gain` is how much of AdamW's improvement on the untrained model was reached.
    """
    reference = {run["seed"]: run["loss"] for run in studies[REFERENCE]["runs"]}
    rows = []
    for name, study in studies.items():
        runs: Sequence[Json] = study["runs"]
        memory = runs[0]["bytes_per_parameter"]
        row: dict[str, Any] = {
            "arm": name,
            "label": ARMS[name].label,
            "family": ARMS[name].family,
            "bytes": memory,
            "total_bytes": sum(memory.values()),
            "learning_rate": runs[0]["learning_rate"],
            "search": [[t["learning_rate"], t["loss"]] for t in study["search"]],
            "seeds": [run["seed"] for run in runs],
            "losses": [run["loss"] for run in runs],
        }
        if all(run["loss"] is not None for run in runs):
            excess = [100 * (run["loss"] / reference[run["seed"]] - 1) for run in runs]
            gains = [(untrained - run["loss"]) / (untrained - reference[run["seed"]]) for run in runs]
            row |= {
                "loss": statistics.fmean(run["loss"] for run in runs),
                "excess": {"mean": statistics.fmean(excess), "low": min(excess), "high": max(excess)},
                "gain": statistics.fmean(gains),
            }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["total_bytes"], row["arm"]))


def points(rows: Sequence[Json]) -> list[Point]:
    return [
        Point(
            row["label"],
            row["family"],
            row["total_bytes"],
            row["excess"]["mean"],
            row["excess"]["low"],
            row["excess"]["high"],
        )
        for row in rows
        if "excess" in row
    ]


def table(rows: Sequence[Json]) -> str:
    """Leanest first; bold what is within the budget and at parity."""
    lines = [
        "| optimizer | bytes a parameter: weights + gradients + state | learning rate | held-out loss, 3 seeds | "
        "against AdamW | of AdamW's gain |",
        "|---|---|---|---|---|---|",
    ]
    lines[0] = lines[0].replace("3 seeds", f"{len(rows[0]['seeds'])} seeds" if rows else "")
    for row in rows:
        memory = row["bytes"]
        total = (
            f"{memory['weights']:.2f} + {memory['gradients']:.2f} + {memory['state']:.2f} = {row['total_bytes']:.2f}"
        )
        if "excess" not in row:
            lines.append(f"| {row['label']} | {total} | {row['learning_rate']:g} | diverged | | |")
            continue
        excess, deviation = row["excess"], statistics.stdev(row["losses"]) if len(row["losses"]) > 1 else 0.0
        against = f"{excess['mean']:+.2f}% [{excess['low']:+.2f} – {excess['high']:+.2f}]"
        met = row["total_bytes"] <= BUDGET and excess["high"] <= PARITY
        label = f"**{row['label']}**" if met else row["label"]
        lines.append(
            f"| {label} | {total} | {row['learning_rate']:g} | {row['loss']:.4f} ± {deviation:.4f} | "
            f"{'—' if row['arm'] == REFERENCE else against} | {row['gain']:.0%} |"
        )
    return "\n".join(lines) + "\n"
