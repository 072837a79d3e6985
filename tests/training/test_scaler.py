"""The fp16 path of the step, on the CPU: a small scaler with torch's contract stands in for CUDA's.

torch.amp.GradScaler itself needs a device with fp16 products. Its contract (torch.amp docs, "Gradient Scaling"):
`scale` multiplies the loss; `unscale_` divides the gradients and notes whether any is not finite; `step` leaves the
optimizer out if so; `update` then halves the scale, and zero_grad is the caller's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.conftest import build_tiny
from tunelab.config import AdamWConfig, SFTConfig, SGDConfig
from tunelab.data import pack
from tunelab.errors import EXIT_DIVERGED, DivergedError
from tunelab.objectives import build_objective
from tunelab.optim import build_optimizer
from tunelab.training.state import TrainState
from tunelab.training.step import MIN_LOSS_SCALE, MicroBatch, train_step
from tunelab.types import Completion, Example, Metrics, Origin


class SmallScaler:
    """The contract above, and no more; the order of the calls is kept."""

    def __init__(self, scale: float) -> None:
        self.value = scale
        self.overflowed = False
        self.calls: list[str] = []

    def scale(self, loss: Tensor) -> Tensor:
        self.calls.append("scale")
        return loss * self.value

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("unscale_")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= self.value
                self.overflowed |= not bool(torch.isfinite(parameter.grad).all())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("step")
        if not self.overflowed:
            optimizer.step()

    def update(self) -> None:
        self.calls.append("update")
        self.value *= 0.5 if self.overflowed else 1.0
        self.overflowed = False

    def get_scale(self) -> float:
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["scale"]


def batches() -> list[MicroBatch]:
    examples = []
    for line, length in enumerate((20, 5, 9), 1):
        completion = Completion(np.arange(length, dtype=np.int32), np.ones(length, dtype=bool))
        examples.append(Example(np.arange(3, dtype=np.int32), (completion,), Origin("test", line)))
    return [MicroBatch(pack([example], [index])) for index, example in enumerate(examples)]


def build_state(scaler: SmallScaler | None, optimizer: SGDConfig | AdamWConfig | None = None) -> TrainState:
    loaded = build_tiny()
    built = build_optimizer(loaded.model.named_parameters(), optimizer or SGDConfig(), "cpu")
    return TrainState(loaded, built, scaler)  # type: ignore[arg-type]


def one_step(state: TrainState) -> Metrics:
    return train_step(state, build_objective(SFTConfig()), batches(), learning_rate=0.1, max_grad_norm=0.05)


def weights(state: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in state.loaded.model.parameters()])


def overflow(state: TrainState) -> torch.utils.hooks.RemovableHandle:
    """From now on a gradient is infinite, as that of an fp16 product can be; the loss is not."""
    return next(state.loaded.model.parameters()).register_hook(lambda grad: grad * float("inf"))


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
def test_the_scale_cancels(scale: float) -> None:
    """A power of two only moves exponents: loss, norm, clipping and update are those without a scaler."""
    plain, scaled = build_state(None), build_state(SmallScaler(scale))
    expected, found = one_step(plain), one_step(scaled)
    assert found.pop("loss_scale") == scale
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["grad_norm"] > 0.05, "the control: clipping must have had something to do"
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=0, atol=1e-7)


def test_unscaled_once_between_the_last_backward_and_the_update() -> None:
    state = build_state(scaler := SmallScaler(8.0))
    one_step(state)
    assert scaler.calls == ["scale", "scale", "scale", "unscale_", "step", "update"]


def test_an_overflow_is_skipped_and_the_scale_lowered() -> None:
    state = build_state(SmallScaler(1024.0))
    handle, before = overflow(state), weights(state)
    metrics = one_step(state)
    assert torch.equal(weights(state), before), "nothing was updated"
    assert metrics["loss_scale"] == 512.0
    assert np.isfinite(metrics["train/loss"])
    assert all(parameter.grad is None for parameter in state.loaded.model.parameters()), "nothing is carried over"
    handle.remove()
    metrics = one_step(state)
    assert metrics["loss_scale"] == 512.0
    assert not torch.equal(weights(state), before), "and the next step updates again"
    plain = build_state(None)
    one_step(plain)
    torch.testing.assert_close(weights(state), weights(plain), rtol=0, atol=1e-7)


def test_a_skipped_step_leaves_adams_moments_alone() -> None:
    state = build_state(SmallScaler(1024.0), AdamWConfig())
    one_step(state)

    def moments() -> list[Tensor]:
        return [value.clone() for entry in state.optimizer.state.values() for value in entry.values()]

    before = moments()
    overflow(state)
    one_step(state)
    after = moments()
    assert before
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.isfinite(value).all() for value in after)


def test_at_the_least_scale_an_overflow_is_divergence() -> None:
    """From 8 the scale is halved three times, to 1; what overflows there overflows everywhere."""
    state = build_state(scaler := SmallScaler(8.0))
    overflow(state)
    before = weights(state)
    assert [one_step(state)["loss_scale"] for _ in range(3)] == [4.0, 2.0, 1.0]
    assert scaler.get_scale() == MIN_LOSS_SCALE
    with pytest.raises(DivergedError, match="gradient norm is not finite") as caught:
        one_step(state)
    assert caught.value.exit_code == EXIT_DIVERGED == 5
    assert torch.equal(weights(state), before)


def test_a_loss_that_is_not_finite_is_divergence_at_any_scale() -> None:
    state = build_state(SmallScaler(1024.0))
    with torch.no_grad():
        state.loaded.model.transformer.wpe.weight[3, 0] = float("nan")
    before = weights(state)
    with pytest.raises(DivergedError, match="the loss is not finite"):
        one_step(state)
    assert torch.equal(weights(state).nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_checkpoint_holds_the_scale() -> None:
    state = build_state(SmallScaler(64.0))
    overflow(state)
    one_step(state)
    fresh = build_state(SmallScaler(64.0))
    fresh.load_numbers(state.numbers())
    assert fresh.scaler is not None
    assert fresh.scaler.get_scale() == 32.0
