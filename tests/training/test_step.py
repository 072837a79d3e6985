"""The optimizer step: clipping, the guard, the learning rate it is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.training.conftest import build_tiny
from tunelab.config import SFTConfig, SGDConfig
from tunelab.data import pack
from tunelab.errors import EXIT_DIVERGED, DivergedError
from tunelab.objectives import build_objective
from tunelab.optim import build_optimizer
from tunelab.training.state import TrainState
from tunelab.training.step import MicroBatch, train_step
from tunelab.types import Completion, Example, Origin


def one_state() -> tuple[TrainState, list[MicroBatch]]:
    loaded = build_tiny()
    state = TrainState(loaded, build_optimizer(loaded.model.named_parameters(), SGDConfig(), "cpu"), None)
    completion = Completion(np.arange(20, dtype=np.int32), np.ones(20, dtype=bool))
    example = Example(np.arange(5, dtype=np.int32), (completion,), Origin("test", 1))
    return state, [MicroBatch(pack([example], [0]))]


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in state.loaded.model.parameters()])


def test_plain_sgd_moves_by_learning_rate_times_clipped_norm() -> None:
    """θ' = θ − η g·min(1, c/‖g‖), so ‖θ' − θ‖ = η·c when the norm is above c: 0.5 · 0.01 = 0.005."""
    state, batches = one_state()
    before = weights(state)
    metrics = train_step(state, build_objective(SFTConfig()), batches, learning_rate=0.5, max_grad_norm=0.01)
    assert metrics["grad_norm"] > 0.01
    assert (weights(state) - before).norm().item() == pytest.approx(0.005, rel=1e-3)
    assert metrics["learning_rate"] == 0.5


def test_without_clipping_the_whole_gradient_is_used() -> None:
    state, batches = one_state()
    before = weights(state)
    metrics = train_step(state, build_objective(SFTConfig()), batches, learning_rate=0.5, max_grad_norm=None)
    assert (weights(state) - before).norm().item() == pytest.approx(0.5 * metrics["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_before_any_weight_changes(value: float) -> None:
    state, batches = one_state()
    with torch.no_grad():
        state.loaded.model.transformer.wpe.weight[3, 0] = value
    before = weights(state)
    with pytest.raises(DivergedError, match=r"step 1: the loss is not finite .*Lower optimizer") as caught:
        train_step(state, build_objective(SFTConfig()), batches, learning_rate=0.5, max_grad_norm=1.0)
    assert caught.value.exit_code == EXIT_DIVERGED == 5
    assert torch.equal(weights(state).nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_non_finite_gradient_stops_before_any_weight_changes() -> None:
    state, batches = one_state()
    parameter = next(state.loaded.model.parameters())
    parameter.register_hook(lambda grad: grad * float("inf"))
    before = weights(state)
    with pytest.raises(DivergedError, match="gradient norm is not finite"):
        train_step(state, build_objective(SFTConfig()), batches, learning_rate=0.5, max_grad_norm=1.0)
    assert torch.equal(weights(state), before)


def test_gradients_are_cleared_between_steps() -> None:
    state, batches = one_state()
    train_step(state, build_objective(SFTConfig()), batches, learning_rate=1e-12, max_grad_norm=None)
    assert all(p.grad is None for p in state.loaded.model.parameters())
