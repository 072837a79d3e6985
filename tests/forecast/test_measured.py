"""The forecast that a run records, against what it then took, in fresh processes. Memory only: nothing is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, sys
from tunelab.config import parse_recipe
from tunelab.progress import SilentProgress
from tunelab.train import train
record = train(parse_recipe(json.loads(sys.argv[1])), progress=SilentProgress()).record()
print("RECORD" + json.dumps([record["forecast"]["memory"]["peak_bytes"], record["cost"]["peak_memory_bytes"]]))
"""


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_peak_memory_is_as_foretold(method: str, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "model": {"name": "tiny-gpt2", "device": "cpu", "precision": "float32"},
        "data": {"train": "builtin:helpful-mini", "limit_train": 32, "max_length": 256},
        "method": {"name": method},
        "training": {"max_steps": 4, "num_threads": 1, "output_dir": str(tmp_path)},
        "evaluation": {"eval_samples": 8, "generation_prompts": 0},
    }
    environment = os.environ | {"TUNELAB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(recipe)], capture_output=True, text=True, env=environment, check=True
    )
    line = next(line for line in ended.stdout.splitlines() if line.startswith("RECORD"))
    foretold, measured = json.loads(line.removeprefix("RECORD"))
    assert foretold == pytest.approx(measured, rel=0.15)
