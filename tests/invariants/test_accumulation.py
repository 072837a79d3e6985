"""8 micro-batches of 1, 4 of 2 and 1 of 8 give the same update to float32 rounding, with unequal lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.training.conftest import build_tiny
from tunelab.config import AdamWConfig, DPOConfig, SFTConfig, SGDConfig
from tunelab.data import pack
from tunelab.objectives import build_objective
from tunelab.optim import build_optimizer
from tunelab.training.state import TrainState
from tunelab.training.step import MicroBatch, train_step
from tunelab.types import Completion, Example, Origin

LENGTHS = [(3, 20, 4), (9, 2, 11), (1, 1, 30), (14, 7, 3), (5, 16, 16), (2, 40, 1), (8, 3, 9), (6, 12, 2)]
"""(prompt, chosen, rejected) tokens: as unequal as dialogue data."""


def examples(pairs: bool) -> list[Example]:
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, 256, length).astype(np.int32)

    def completion(length: int) -> Completion:
        return Completion(ids(length), np.ones(length, dtype=bool))

    return [
        Example(ids(p), tuple(completion(c) for c in ((a, b) if pairs else (a,))), Origin("test", line))
        for line, (p, a, b) in enumerate(LENGTHS, 1)
    ]


def updated(size: int, method: SFTConfig | DPOConfig, optimizer: SGDConfig | AdamWConfig) -> tuple[dict, dict]:
    """Weights and metrics after one step over all eight records in micro-batches of `size`."""
    pairs = isinstance(method, DPOConfig)
    records = examples(pairs)
    objective = build_objective(method)
    reference = torch.linspace(-90, -10, 16).reshape(8, 2)
    loaded = build_tiny()
    state = TrainState(loaded, build_optimizer(loaded.model.named_parameters(), optimizer, "cpu"), None)
    micro_batches = []
    for start in range(0, 8, size):
        rows = list(range(start, start + size))
        packed = pack([records[i] for i in rows], rows)
        micro_batches.append(MicroBatch(packed, reference[rows] if objective.needs_reference else None))
    metrics = train_step(state, objective, micro_batches, learning_rate=0.1, max_grad_norm=0.5)
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}, metrics


METHODS = [
    SFTConfig(),
    DPOConfig(),
    DPOConfig(label_smoothing=0.1),
    DPOConfig(loss="robust", label_smoothing=0.1),
    DPOConfig(loss="ipo"),
    DPOConfig(loss="ipo", ipo_normalization="mean"),
    DPOConfig(loss="hinge"),
    DPOConfig(loss="simpo", beta=2.0),
    DPOConfig(loss="orpo"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.model_dump(exclude_unset=True).values())))
def test_any_split_into_micro_batches_gives_the_same_update(method: SFTConfig | DPOConfig) -> None:
    # SGD: the update is the gradient, so rounding is not blown up by Adam's division by tiny second moments.
    expected, expected_metrics = updated(8, method, SGDConfig(learning_rate=0.1))
    start = {name: p.detach() for name, p in build_tiny().model.named_parameters()}
    moved = max((expected[name] - start[name]).abs().max().item() for name in expected)
    assert moved > 1e-4, "the step must change something for the comparison to mean anything"
    for size in (1, 2, 4):
        found, metrics = updated(size, method, SGDConfig(learning_rate=0.1))
        for name in expected:
            difference = (found[name] - expected[name]).abs().max().item()
            assert difference <= 2e-6 * max(1.0, moved), (size, name)
        for name, value in expected_metrics.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (size, name)


def test_a_mean_of_micro_batch_means_would_fail_this_test() -> None:
    """The usual mistake (transformers #34191) is visible with these lengths: the control of the test above."""
    records = examples(pairs=False)
    loaded = build_tiny()
    objective = build_objective(SFTConfig())
    state = TrainState(loaded, build_optimizer(loaded.model.named_parameters(), SGDConfig(), "cpu"), None)
    singles = []
    for index, record in enumerate(records):
        packed = MicroBatch(pack([record], [index]))
        singles.append(train_step(state, objective, [packed], learning_rate=1e-12, max_grad_norm=None)["train/loss"])
    together = [MicroBatch(pack(records, list(range(8))))]
    whole = train_step(state, objective, together, learning_rate=1e-12, max_grad_norm=None)["train/loss"]
    assert abs(sum(singles) / 8 - whole) > 1e-3
