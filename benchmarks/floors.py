"""The FLOPs a step cannot do without: one number, held against both sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.jobs import LORA_RANK, TokenExample, Work, read_examples
from tunelab import cost
from tunelab.config import ModelConfig
from tunelab.data import pack
from tunelab.models.loading import load_skeleton
from tunelab.types import Batch, Completion, Example, Origin


@dataclass(frozen=True)
class Floors:
    """FLOPs of each optimizer step, and of the reference pass over that step's pairs (0 without a reference)."""

    training: tuple[int, ...]
    reference: tuple[int, ...]


def compute_floors(work: Work, model: Path, examples: Path, batch_size: int) -> Floors:
    """Of every step of a workload: `tunelab.cost.floor_flops` on the packed row, prompts counted once."""
    shape = cost.ModelShape.of(load_skeleton(ModelConfig(name=str(model))))
    if work == "lora":
        shape = shape.with_lora(LORA_RANK)
    tokens = read_examples(examples)
    rows = [_row(tokens[start : start + batch_size]) for start in range(0, len(tokens), batch_size)]
    reference = tuple(cost.floor_flops(shape, row, "reference") if work == "dpo" else 0 for row in rows)
    return Floors(tuple(cost.floor_flops(shape, row) for row in rows), reference)


def _row(examples: list[TokenExample]) -> Batch:
    records = [
        Example(
            np.asarray(example.prompt, np.int32),
            tuple(Completion(np.asarray(ids, np.int32), np.ones(len(ids), bool)) for ids in example.completions),
            Origin("benchmark", number),
        )
        for number, example in enumerate(examples, 1)
    ]
    return pack(records, list(range(len(records))))
