"""Each arm's learning rate is tuned, then its seeds run. Every finished trial is a file: a stopped study goes on."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.frontier.arms import ARMS
from benchmarks.frontier.trial import Task, run_trial

FACTOR = math.sqrt(10)
"""Between neighbouring learning rates of a search."""

MOST_EXTENSIONS = 4


def study_arm(task: Task, name: str, centre: float, seeds: Sequence[int], work: Path) -> dict[str, Any]:
    """The rates centre ÷ √10, centre and centre × √10 with the first seed, and further while the best is at an end;
    then every seed at the best.
    """
    trials = {rate: trial(task, name, rate, seeds[0], work) for rate in (centre / FACTOR, centre, centre * FACTOR)}
    for _ in range(MOST_EXTENSIONS):
        rates, best = sorted(trials), _best(trials)
        if best == rates[0]:
            further = best / FACTOR
        elif best == rates[-1]:
            further = best * FACTOR
        else:
            break
        trials[further] = trial(task, name, further, seeds[0], work)
    best = _best(trials)
    runs = [trial(task, name, best, seed, work) for seed in seeds]
    return {"arm": name, "search": [trials[rate] for rate in sorted(trials)], "runs": runs}


def trial(task: Task, name: str, learning_rate: float, seed: int, work: Path) -> dict[str, Any]:
    """The result of one run, from its file where it was made before."""
    rate = float(f"{learning_rate:.2g}")
    path = trials_folder(work) / task.name / f"{name}-lr{rate:g}-seed{seed}-steps{task.steps}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    result = {"arm": name, **run_trial(task, ARMS[name], rate, seed, work)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(path)
    print(describe(result), file=sys.stderr, flush=True)
    return result


def trials_folder(work: Path) -> Path:
    return work / "frontier" / "trials"


def describe(result: dict[str, Any]) -> str:
    memory = result["bytes_per_parameter"]
    loss = "diverged" if result["loss"] is None else f"{result['loss']:.4f}"
    parts = " + ".join(f"{memory[part]:.2f}" for part in ("weights", "gradients", "state"))
    return (
        f"{result['task']} {result['arm']} lr {result['learning_rate']:g} seed {result['seed']}: loss {loss}, "
        f"{parts} = {sum(memory.values()):.2f} B, {result['seconds']:.0f} s"
    )


def _best(trials: dict[float, dict[str, Any]]) -> float:
    return min(trials, key=lambda rate: math.inf if trials[rate]["loss"] is None else trials[rate]["loss"])
