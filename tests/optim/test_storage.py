"""bf16 weights with stochastic rounding, whatever the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.lean import check_equal, one_step, small_batch, small_loaded, small_state, weights
from tunelab.config import AdamWConfig, SFTConfig, SGDConfig
from tunelab.config.optimizers import QuarterConfig
from tunelab.objectives import build_objective
from tunelab.optim import Updates
from tunelab.optim.rounding import generator_for
from tunelab.optim.storage import lent_as_float32
from tunelab.parallel import resolve_precision
from tunelab.training.step import train_step


def constant_steps(steps: int, size: float, seed: int | None, start: float = 1.0, count: int = 1000) -> Tensor:
    """`count` bf16 weights after `steps` of plain SGD that each take `size` away."""
    parameter = nn.Parameter(torch.full((count,), start, dtype=torch.bfloat16))
    updates = Updates(torch.optim.SGD([parameter], lr=size), rounding_seed=seed)
    for step in range(steps):
        updates.begin(step, size)
        parameter.grad = torch.ones_like(parameter)
        updates.finish()
    assert parameter.dtype == torch.bfloat16
    return parameter.detach().float()


def test_steps_that_rounding_to_nearest_loses_add_up() -> None:
    """1 − 2⁻¹² is 1 in bf16, 16 times out of 16. Rounded stochastically the mean is 1 − 16·2⁻¹² exactly; one weight's
    deviation after k steps of size s on a spacing of u = 2⁻⁸ is at most √(k·s·u) (each step moves u or nothing).
    """
    steps, size = 16, 2.0**-12
    assert torch.equal(constant_steps(steps, size, seed=None), torch.ones(1000))
    moved = constant_steps(steps, size, seed=0, count=100_000)
    deviation = (steps * size * 2.0**-8) ** 0.5
    assert moved.mean().item() == pytest.approx(1 - steps * size, abs=5 * deviation / 100_000**0.5)
    assert moved.std().item() <= 1.05 * deviation


def test_the_expectation_is_the_float32_step_over_many_seeds() -> None:
    """Adam's step of one weight: the mean over 4000 seeds is float32's, to five standard errors."""
    start, gradient = torch.tensor([0.02, -0.013, 0.3]), torch.tensor([1e-3, -2e-4, 5e-2])
    exact = nn.Parameter(start.bfloat16().float())
    exact.grad = gradient.bfloat16().float()
    torch.optim.AdamW([exact], lr=3e-5, weight_decay=0.0).step()
    found = []
    for seed in range(4000):
        parameter = nn.Parameter(start.bfloat16())
        updates = Updates(torch.optim.AdamW([parameter], lr=3e-5, weight_decay=0.0), rounding_seed=seed)
        updates.begin(0, 3e-5)
        parameter.grad = gradient.bfloat16()
        updates.finish()
        found.append(parameter.detach().double())
    all_seeds = torch.stack(found)
    error = 5 * all_seeds.std(0) / len(found) ** 0.5
    assert ((all_seeds.mean(0) - exact.detach().double()).abs() <= error).all()
    assert (all_seeds.std(0) > 0).all(), "the control: every weight lies between two bf16 values"


def test_a_parameter_is_lent_as_itself_and_comes_back_where_it_was() -> None:
    parameter = nn.Parameter(torch.randn(5, 3).bfloat16())
    parameter.grad = torch.ones_like(parameter)
    address, before = parameter.data_ptr(), parameter.detach().clone()
    with lent_as_float32(parameter, generator_for(parameter.device, 0)):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter, before.float())
    assert parameter.grad is None
    assert parameter.data_ptr() == address
    assert torch.equal(parameter, before), "what bf16 holds is not rounded"


def test_a_failed_update_leaves_the_weights() -> None:
    parameter = nn.Parameter(torch.randn(5).bfloat16())
    before = parameter.detach().clone()

    def half_an_update() -> None:
        with lent_as_float32(parameter, generator_for(parameter.device, 0)), torch.no_grad():
            parameter.add_(1.0)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        half_an_update()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("releases", [False, True])
def test_state_is_float32_and_the_weights_bf16(releases: bool) -> None:
    loaded = small_loaded(precision="bf16-stored")
    state = small_state(loaded, AdamWConfig(), releases=releases, rounding_seed=0)
    one_step(state)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    for parameter in loaded.model.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            assert state.optimizer.state[parameter][name].dtype == torch.float32


def test_release_rounds_with_the_same_bits() -> None:
    """They are a function of (seed, step, parameter), not of the order in which gradients come."""

    def run(releases: bool, seed: int) -> dict[str, Tensor]:
        loaded = small_loaded(precision="bf16-stored")
        state = small_state(loaded, AdamWConfig(), releases=releases, rounding_seed=seed)
        for _ in range(3):
            one_step(state)
        return weights(loaded)

    plain = run(False, 0)
    check_equal(plain, run(True, 0))
    other = run(False, 1)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_an_optimizer_that_rounds_for_itself_is_left_to_it() -> None:
    loaded = small_loaded(precision="bf16-stored")
    state = small_state(loaded, QuarterConfig(), rounding_seed=0)
    handed: set[torch.dtype] = set()
    step = state.optimizer.step

    def watched(*arguments: Any, **keywords: Any) -> Any:
        handed.update(p.dtype for group in state.optimizer.param_groups for p in group["params"])
        return step(*arguments, **keywords)

    state.optimizer.step = watched  # type: ignore[method-assign]
    one_step(state)
    assert handed == {torch.bfloat16}


def losses_on_one_batch(precision: str, rounding: bool, steps: int = 60) -> list[float]:
    """Plain SGD whose steps are mostly below what bf16 can add to a weight."""
    loaded = small_loaded(precision=precision)
    state = small_state(loaded, SGDConfig(), rounding_seed=0 if rounding else None)
    batch, objective, losses = small_batch(), build_objective(SFTConfig()), []
    for _ in range(steps):
        metrics = train_step(state, objective, [batch], learning_rate=0.01, max_grad_norm=None)
        state.counters.step += 1
        losses.append(metrics["train/loss"])
    return losses


def test_a_small_model_learns_as_in_float32_where_rounding_to_nearest_does_not() -> None:
    exact = losses_on_one_batch("float32", rounding=False)
    stochastic = losses_on_one_batch("bf16-stored", rounding=True)
    nearest = losses_on_one_batch("bf16-stored", rounding=False)
    gain = exact[0] - exact[-1]
    assert gain > 0.1, "the control: there is something to learn"
    assert abs(stochastic[-1] - exact[-1]) < 0.1 * gain
    assert nearest[-1] - exact[-1] > 0.3 * gain


# --- weights in bf16, products in float32 ---------------------------------------------------------------------------


def test_precision_bf16_stored_is_narrow_weights_and_wide_products() -> None:
    precision = resolve_precision("bf16-stored", torch.device("cpu"))
    assert (precision.weights_dtype, precision.product_dtype, precision.compute_dtype) == (
        torch.bfloat16,
        torch.float32,
        None,
    )
