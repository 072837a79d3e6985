"""`gains`: what each shortcut of the engine brings, by switching one off at a time. tunelab against itself."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.jobs import Job, Work
from benchmarks.runner import Runner
from benchmarks.summary import peak_memory, spread, steady_steps
from benchmarks.training import Settings
from benchmarks.workloads import Mix, ModelName, prepare_workload

GAINS: dict[str, str] = {
    "packed rows": "each sequence a padded row of its own, through the model's own forward and its full logits",
    "shared prompts": "each answer of a pair with its own copy of the prompt",
    "fused blocks": "the model's own modules on packed rows",
    "products through oneDNN": "torch's own choice for float32, MKL",
    "last block pruned": "every position through the whole last block",
    "gradient in the forward pass": "the logits projected again in the backward pass",
    "attention in blocks of queries": "one product a sequence, with all keys above the diagonal",
    "logits in blocks of the vocabulary": "one product for the whole vocabulary",
    "freed memory kept": "the C library's own settings",
    "micro-batches by tokens": "one record a micro-batch",
}
"""What is switched off, and what is done instead."""

ONLY_PAIRS = ("shared prompts",)


def gains_of(work: Work) -> list[str]:
    """Those that play a part in `work`."""
    return [
        name
        for name in GAINS
        if (work == "dpo" or name not in ONLY_PAIRS)
        and not (name == "gradient in the forward pass" and work == "dpo")  # a trained head under DPO has none
    ]


def count_gain_processes(work: Work, settings: Settings) -> int:
    return settings.repeats * (len(gains_of(work)) + 1)


def measure_gains(work: Work, model: ModelName, mix: Mix, runner: Runner, settings: Settings) -> dict[str, Any]:
    """Rounds of all variants, the whole engine among them; each is set against the whole engine of its own round."""
    workload = prepare_workload(
        work,
        model,
        mix,
        "sequential",
        folder=settings.work_folder,
        data=settings.data,
        steps=settings.steps,
        batch_size=settings.batch_size,
    )
    shared: dict[str, Any] = {
        "work": work,
        "side": "tunelab",
        "model": str(workload.model),
        "examples": str(workload.examples),
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "threads": settings.threads,
        "device": settings.device,
        "precision": settings.precision,
    }
    variants = {"all": Job(**shared)} | {name: Job(options={"without": name}, **shared) for name in gains_of(work)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for repeat in range(settings.repeats):
        for name, job in variants.items():
            runs[name].append(runner.run(job, repeat))
    whole = [_figures(run) for run in runs["all"]]
    rows = []
    for name in gains_of(work):
        without = [_figures(run) for run in runs[name]]
        losses = [abs(a - b) / abs(b) for a, b in zip(runs[name][0]["losses"], runs["all"][0]["losses"], strict=True)]
        rows.append(
            {
                "gain": name,
                "instead": GAINS[name],
                "slower": spread([b[0] / a[0] for a, b in zip(whole, without, strict=True)]),
                "memory": spread([b[1] / a[1] for a, b in zip(whole, without, strict=True)]),
                "losses_differ_by": max(losses),
            }
        )
        print(f"without {name}: {rows[-1]['slower']['median']:.2f} times the time", file=sys.stderr)
    return {
        "work": work,
        "model": model,
        "mix": mix,
        "kind": "gains",
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "repeats": settings.repeats,
        "precision": settings.precision,
        "step_seconds": spread([figures[0] for figures in whole]),
        "rows": rows,
        "runs": runs,
    }


def _figures(run: dict[str, Any]) -> tuple[float, int]:
    """Seconds of a steady step, bytes at the peak."""
    steps: Sequence[float] = run["step_seconds"]
    return statistics.mean(steps[steady_steps(len(steps))]), peak_memory(run)
