"""`startup`: seconds from the command line to the first optimizer step, and to the help page."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.summary import spread
from benchmarks.training import Settings
from benchmarks.workloads import ROOT

TARGET_STEP = 8.0
TARGET_HELP = 0.5
POLL_SECONDS = 0.01

RECIPE = ROOT / "recipes" / "tiny-sft.yaml"
"""As shipped: data tokenised, the untrained model evaluated and made to answer before the first step."""


def measure_startup(settings: Settings) -> dict[str, Any]:
    """Both starts, each in fresh processes with an empty cache; the result is a whole file but for its provenance."""
    tunelab = str(Path(sys.executable).with_name("tunelab"))
    first_step = [_seconds_to_first_step(tunelab, settings) for _ in range(settings.repeats)]
    shown_help = [_seconds_of_help(tunelab) for _ in range(settings.repeats)]
    return {
        "work": "startup",
        "repeats": settings.repeats,
        "starts": [
            {
                "says": "`tunelab sft recipes/tiny-sft.yaml`, to the end of the first optimizer step",
                "seconds": spread(first_step),
                "target": TARGET_STEP,
            },
            {"says": "`tunelab --help`", "seconds": spread(shown_help), "target": TARGET_HELP},
        ],
    }


def _seconds_to_first_step(tunelab: str, settings: Settings) -> float:
    """Until the run's metrics.jsonl has the line of step 1. Raises RuntimeError if the command ends without it."""
    with tempfile.TemporaryDirectory(dir=settings.work_folder) as folder:
        metrics = Path(folder) / "runs" / "startup" / "metrics.jsonl"
        environment = os.environ | {"TUNELAB_CACHE": f"{folder}/cache"}
        log = Path(folder) / "log"
        with log.open("w") as stream:
            began = time.perf_counter()
            process = subprocess.Popen(
                [tunelab, "sft", str(RECIPE), "training.run_name=startup"],
                cwd=folder,
                env=environment,
                stdout=stream,
                stderr=stream,
            )
            while not (metrics.is_file() and '"train/loss"' in metrics.read_text()):
                if process.poll() is not None and not metrics.is_file():
                    raise RuntimeError(f"tunelab sft ended with {process.returncode}: {log.read_text()[-500:]}")
                time.sleep(POLL_SECONDS)
            seconds = time.perf_counter() - began
            process.wait()
    return seconds


def _seconds_of_help(tunelab: str) -> float:
    began = time.perf_counter()
    subprocess.run([tunelab, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began
