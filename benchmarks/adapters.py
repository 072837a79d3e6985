"""`adapters`: our fused path against stock peft's modules inside the same engine, for LoRA and DoRA.

Both sides are tunelab: packed rows, the same micro-batches, log-probabilities at loss positions only, the same
optimizer and the same initial A. `ours` runs the blocks as functions of our own (`model.kernels: auto`), `peft` the
model's own modules with peft's layers in them (`model.kernels: plain`). A third side, our blocks with torch's own
choice of library for float32 products, tells what is due to the blocks alone.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.jobs import LORA_RANK, Job
from benchmarks.runner import Runner
from benchmarks.summary import LOSS_TOLERANCE, peak_memory, spread, steady_steps
from benchmarks.training import Settings
from benchmarks.workloads import Mix, ModelName, prepare_workload

ADAPTERS: dict[str, dict[str, Any]] = {
    f"LoRA, r = {LORA_RANK}": {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK},
    "LoRA, r = 16": {"r": 16, "lora_alpha": 32},
    "DoRA, r = 16": {"r": 16, "lora_alpha": 32, "use_dora": True},
}
"""Fields of `adapter`, on every linear layer of the blocks."""

SIDES: dict[str, dict[str, Any]] = {
    "ours": {"kernels": "auto"},
    "blocks alone": {"kernels": "auto", "without": "products through oneDNN"},
    "peft": {"kernels": "plain"},
}

TARGETS = {"LoRA": 1.2, "DoRA": 1.0}
"""Least speed against peft's modules that the project asks of itself."""


def count_adapter_processes(settings: Settings) -> int:
    return len(ADAPTERS) * len(SIDES) * settings.repeats


def measure_adapters(model: ModelName, mix: Mix, runner: Runner, settings: Settings) -> dict[str, Any]:
    """Rounds of all sides of each adapter; every side is set against peft's of its own round."""
    workload = prepare_workload(
        "lora",
        model,
        mix,
        "sequential",
        folder=settings.work_folder,
        data=settings.data,
        steps=settings.steps,
        batch_size=settings.batch_size,
    )
    rows, runs = [], {}
    for name, adapter in ADAPTERS.items():
        jobs = {
            side: Job(
                work="lora",
                side="tunelab",
                model=str(workload.model),
                examples=str(workload.examples),
                batch_size=settings.batch_size,
                steps=settings.steps,
                threads=settings.threads,
                device=settings.device,  # type: ignore[arg-type]
                precision=settings.precision,  # type: ignore[arg-type]
                options={"adapter": adapter, **options},
            )
            for side, options in SIDES.items()
        }
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in jobs}
        for repeat in range(settings.repeats):
            for side, job in jobs.items():
                found[side].append(runner.run(job, repeat))
        runs[name] = found
        rows.append(summarise(name, found, workload.real_tokens, settings.precision))
        print(f"{name}: {rows[-1]['sides']['ours']['speed']['median']:.2f} times peft's speed", file=sys.stderr)
    return {
        "work": "adapters",
        "model": model,
        "mix": mix,
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "repeats": settings.repeats,
        "precision": settings.precision,
        "data": workload.source,
        "lengths": workload.lengths,
        "rows": rows,
        "runs": runs,
    }


def summarise(
    name: str, found: Mapping[str, Sequence[Mapping[str, Any]]], real_tokens: Sequence[int], precision: str
) -> dict[str, Any]:
    """Medians and spread of every side; `speed` and `memory` against peft's run of the same round, and whether the
    losses are the same (a speed with another loss does not count).
    """
    steady = steady_steps(len(real_tokens))
    seconds = {side: [statistics.mean(run["step_seconds"][steady]) for run in runs] for side, runs in found.items()}
    memory = {side: [peak_memory(run) for run in runs] for side, runs in found.items()}
    losses = found["peft"][0]["losses"]
    differences = {
        side: max(abs(a - b) / abs(b) for run in runs for a, b in zip(run["losses"], losses, strict=True))
        for side, runs in found.items()
    }
    tokens = statistics.mean(real_tokens[steady])
    sides = {
        side: {
            "step_seconds": spread(seconds[side]),
            "tokens_per_second": spread([tokens / taken for taken in seconds[side]]),
            "peak_memory_bytes": spread(memory[side]),
            "speed": spread([b / a for a, b in zip(seconds[side], seconds["peft"], strict=True)]),
            "memory": spread([a / b for a, b in zip(memory[side], memory["peft"], strict=True)]),
            "losses_differ_by": differences[side],
            "agree": differences[side] <= LOSS_TOLERANCE[precision],
            "cpu_share": spread([run["cpu_share"] for run in runs]),
        }
        for side, runs in found.items()
    }
    return {
        "adapter": name,
        "trainable_parameters": found["ours"][0]["trainable_parameters"],
        "target": TARGETS[name[:4]],
        "sides": sides,
    }
