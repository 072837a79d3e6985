"""Short loss curves of `tiny-gpt2`, and how to record them: `make golden`.

The curves are kept with their provenance. They say nothing about quality; they notice a change nobody meant.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tunelab.config import parse_recipe
from tunelab.progress import choose_progress
from tunelab.runs import environment_record
from tunelab.train import train

CURVES = Path(__file__).with_name("curves.json")
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "dpo": {"name": "dpo"},
    "cdpo": {"name": "dpo", "label_smoothing": 0.1},
    "ipo": {"name": "dpo", "loss": "ipo"},
    "orpo": {"name": "dpo", "loss": "orpo"},
}


def curve(method: str, output_dir: str) -> list[float]:
    """train/loss of the first steps of a fixed recipe, in order."""
    recipe = parse_recipe(
        {
            "model": {"name": "tiny-gpt2", "device": "cpu"},
            "data": {"train": "builtin:helpful-mini", "max_length": 192, "limit_train": 48},
            "method": METHODS[method],
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "schedule": {"lr_scheduler_type": "cosine"}},
            "training": {
                "per_device_train_batch_size": 3,
                "gradient_accumulation_steps": 2,
                "num_threads": 1,
                "output_dir": output_dir,
                "run_name": method,
            },
            "evaluation": {"generation_prompts": 0, "eval_samples": 2},
        }
    )
    run = train(recipe, progress=choose_progress(quiet=True))
    return [row["train/loss"] for row in run.metrics("train")]


def main() -> None:
    """Write `curves.json`."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNELAB_CACHE"] = folder
        curves = {method: curve(method, folder) for method in METHODS}
    provenance = {"command": "make golden", "after_commit": commit, **environment_record()}
    CURVES.write_text(json.dumps({"provenance": provenance, "curves": curves}, indent=1) + "\n")


if __name__ == "__main__":
    main()
