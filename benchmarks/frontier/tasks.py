"""The three comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from benchmarks.frontier.base import prepare_base, prepare_scratch
from benchmarks.frontier.trial import Task
from tunelab.models.builtin import SMOLLM2

TaskName = Literal["tune", "scratch", "smollm2"]

TITLES: dict[str, str] = {
    "tune": "fine-tuning a GPT-2 of 7.0 million parameters",
    "scratch": "the same model from random weights",
    "smollm2": "fine-tuning SmolLM2-135M",
}

RATES: dict[str, dict[str, float]] = {
    "scratch": {
        "adamw": 9.5e-4,
        "quarter": 9.5e-4,
        "adafactor_lean": 9.5e-4,
        "adamw_8bit": 9.5e-4,
        "adalomo_lean": 3e-2,
    },
    "smollm2": {"adamw": 9.5e-5, "quarter": 9.5e-5, "lora": 1e-3, "adafactor_lean": 9.5e-5, "adalomo_lean": 9.5e-4},
}
"""Where the search for a learning rate begins; for fine-tuning the small model `arms.py` says it. An arm without a rate
here takes no part in the comparison."""


def make_task(name: TaskName, work: Path) -> Task:
    """With its model prepared."""
    if name == "tune":
        model = str(prepare_base(work))
        return Task(name, model, "chats", steps=60, records=4, max_length=160, held_out=100)
    if name == "scratch":
        model = str(prepare_scratch(work))
        return Task(name, model, "texts", steps=120, records=4, max_length=160, held_out=100)
    return Task(name, SMOLLM2, "answers", steps=16, records=4, max_length=128, held_out=40)
