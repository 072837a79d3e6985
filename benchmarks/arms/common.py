"""What both sides do alike: read a job, seed an adapter, write the answer. torch and the standard library only."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.jobs import Job
from benchmarks.measure import MemoryMeter, matmul_ceiling, versions


def run_arm(measure: Callable[[Job], dict[str, Any]]) -> None:
    """`main` of an arm whose imports are done: `measure` a job and write its answer beside what holds for every job.

    The result file appears whole or not at all: a killed process leaves nothing to be mistaken for a measurement.
    """
    job_path, result_path = map(Path, sys.argv[1:3])
    job = Job.read(job_path)
    torch.set_num_threads(job.threads)
    meter = MemoryMeter(job.device)
    wall, processor = time.perf_counter(), time.process_time()
    result = measure(job)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    result["cpu_share"] = processor / wall / job.threads  # well below 1 on a CPU: others took the cores
    result |= {"memory": meter.result(), "versions": versions(), "threads": torch.get_num_threads()}
    result["ceiling"] = matmul_ceiling(job.device, job.precision)  # after the memory was read: it needs some itself
    temporary = result_path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(result_path)


class Clock:
    """Seconds of the phases of one job; the first begins when the clock is made."""

    def __init__(self) -> None:
        self.started = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> float:
        """End the phase: its seconds."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
        return elapsed

    @property
    def total(self) -> float:
        return self._last - self.started


def seed_adapter(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """peft's own initial distribution of LoRA's A (Kaiming uniform, a = √5), drawn so that both sides get the same.

    The generator runs over the A matrices in the model's order, whatever random numbers either side used before.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters:
        if "lora_A" in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                parameter.copy_(values)
