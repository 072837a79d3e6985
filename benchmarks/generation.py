"""`generate`: tunelab's generation against transformers' `generate`, the same greedy tokens."""

from __future__ import annotations

from typing import Any

from benchmarks.jobs import Job
from benchmarks.peers import STATIC, PeerArm
from benchmarks.runner import Runner
from benchmarks.summary import paired_ratio, peak_memory, spread
from benchmarks.training import Settings, all_arms
from benchmarks.workloads import ModelName, prepare_workload

NEW_TOKENS = 128
BATCHES = 4
"""Times the batch is generated in a process; the first is warm-up."""


def count_generation_processes(settings: Settings) -> int:
    return len(all_arms("generate", settings)) * (2 * settings.repeats + 1)


def measure_generation(model: ModelName, runner: Runner, settings: Settings) -> dict[str, Any]:
    """Every arm; the result is a whole file of `results/` but for its provenance."""
    arms = all_arms("generate", settings)
    return {
        "work": "generate",
        "model": model,
        "batch_size": settings.batch_size,
        "new_tokens": NEW_TOKENS,
        "repeats": settings.repeats,
        "precision": settings.precision,
        "comparisons": [_compare_arm(arm, model, runner, settings) for arm in arms],
        "best": STATIC.name if STATIC in arms else None,
    }


def _compare_arm(arm: PeerArm, model: ModelName, runner: Runner, settings: Settings) -> dict[str, Any]:
    workload = prepare_workload(
        "generate",
        model,
        "short",
        "sequential",
        folder=settings.work_folder,
        data=settings.data,
        steps=1,
        batch_size=settings.batch_size,
    )
    shared: dict[str, Any] = {
        "work": "generate",
        "model": str(workload.model),
        "examples": str(workload.examples),
        "batch_size": settings.batch_size,
        "steps": BATCHES,
        "threads": settings.threads,
        "device": settings.device,
        "precision": settings.precision,
    }
    new = {"new_tokens": NEW_TOKENS}
    ours, theirs = runner.interleave(
        Job(side="tunelab", options=new, **shared), Job(side="trl", options=new | arm.flags, **shared), settings.repeats
    )
    mine, other = (_summarise(runs, settings.batch_size) for runs in (ours, theirs))
    return {
        "arm": arm.name,
        "says": arm.says,
        "flags": arm.flags,
        "ours": mine,
        "peer": other,
        "ratios": {name: paired_ratio(mine, other, key) for name, key in RATIOS.items()},
        "same_tokens": same_tokens(ours[0]["tokens"], theirs[0]["tokens"]),
        "runs": {"ours": ours, "peer": theirs},
    }


RATIOS = {"tokens_per_second": "tokens_per_second", "peak_memory": "peak_memory_bytes"}


def _summarise(runs: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    per_run = [(batch_size * NEW_TOKENS * len(s) / sum(s), run) for run in runs if (s := run["step_seconds"][1:])]
    return {
        "tokens_per_second": spread([rate for rate, _ in per_run]),
        "peak_memory_bytes": spread([peak_memory(run) for _, run in per_run]),
        "seconds_to_n": spread([run["seconds_to_n"] for _, run in per_run]),
    }


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of generated tokens that are equal, place by place. A row counts as different from its first difference
    on: in float32 two sums in another order can tip a near tie, and everything after it has another past."""
    equal = 0
    for mine, other in zip(ours, theirs, strict=True):
        equal += next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
    return equal / sum(map(len, ours))
