"""The preference losses as functions: values derived by hand, identities, gradients, extremes.

Unless a docstring says otherwise the pair is

    policy chosen -10, rejected -12; reference chosen -11, rejected -12    →    h = (1) - (0) = 1

and values are to 1e-6, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunelab.objectives import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    log_odds_ratio,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)

POLICY = torch.tensor([[-10.0, -12.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11.0, -12.0]], dtype=torch.float64)

WITH_REFERENCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo": partial(dpo_loss, beta=0.1),
    "conservative": partial(dpo_loss, beta=0.1, label_smoothing=0.2),
    "robust": partial(robust_dpo_loss, beta=0.1, label_smoothing=0.2),
    "ipo": partial(ipo_loss, beta=0.1),
    "hinge": partial(hinge_loss, beta=0.1),
}
REFERENCE_FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "simpo": partial(simpo_loss, beta=2.0, gamma=0.5),
    "orpo": partial(orpo_loss, beta=0.1),
}


def margin(h: float) -> tuple[Tensor, Tensor]:
    """Policy and reference of one pair whose log-ratio difference is `h`."""
    return torch.tensor([[h, 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)


def test_dpo_by_hand() -> None:
    """β = 0.5: -log σ(0.5) = log(1 + e^-0.5) = log 1.606531 = 0.474077."""
    assert dpo_loss(POLICY, REFERENCE, beta=0.5).item() == pytest.approx(0.474077, abs=1e-6)


def test_conservative_dpo_by_hand() -> None:
    """ε = 0.2: ℓ(0.5) = 0.474077 and ℓ(-0.5) = ℓ(0.5) + 0.5 = 0.974077;
    0.8 · 0.474077 + 0.2 · 0.974077 = 0.379262 + 0.194815 = 0.574077."""
    assert dpo_loss(POLICY, REFERENCE, beta=0.5, label_smoothing=0.2).item() == pytest.approx(0.574077, abs=1e-6)


def test_robust_dpo_by_hand() -> None:
    """ε = 0.2: (0.8 · 0.474077 - 0.2 · 0.974077) / 0.6 = (0.379262 - 0.194815) / 0.6 = 0.307410."""
    loss = robust_dpo_loss(POLICY, REFERENCE, beta=0.5, label_smoothing=0.2)
    assert loss.item() == pytest.approx(0.307410, abs=1e-6)


def test_ipo_by_hand() -> None:
    """β = 0.1: (1 - 1/0.2)² = (-4)² = 16."""
    assert ipo_loss(POLICY, REFERENCE, beta=0.1).item() == pytest.approx(16.0, abs=1e-12)


def test_hinge_by_hand() -> None:
    """β = 0.5: max(0, 1 - 0.5) = 0.5; β = 2: max(0, 1 - 2) = 0."""
    assert hinge_loss(POLICY, REFERENCE, beta=0.5).item() == pytest.approx(0.5, abs=1e-12)
    assert hinge_loss(POLICY, REFERENCE, beta=2.0).item() == 0.0


def test_simpo_by_hand() -> None:
    """Averages -1 and -1.5, β = 2, γ = 0.5: 2 · 0.5 - 0.5 = 0.5, and ℓ(0.5) = 0.474077.

    With the authors' code's reading, γ a ratio to be multiplied by β, the argument would be 0 and the loss log 2.
    """
    loss = simpo_loss(torch.tensor([[-1.0, -1.5]], dtype=torch.float64), beta=2.0, gamma=0.5)
    assert loss.item() == pytest.approx(0.474077, abs=1e-6)


def test_orpo_by_hand() -> None:
    """P(chosen) = 1/2, odds 1; P(rejected) = 1/4, odds 1/3; log odds ratio log 3.

    NLL log 2 = 0.693147; -log σ(log 3) = log(1 + 1/3) = 0.287682; λ = 0.1: 0.693147 + 0.028768 = 0.721915.
    """
    policy = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log()
    assert log_odds_ratio(policy).item() == pytest.approx(math.log(3), abs=1e-12)
    assert orpo_loss(policy, beta=0.1).item() == pytest.approx(0.721915, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_policy_equal_to_its_reference_scores_log_2(smoothing: float) -> None:
    """h = 0: ℓ(0) = log 2, and both ways of smoothing mix log 2 with itself."""
    policy = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for loss in (dpo_loss, robust_dpo_loss):
        found = loss(policy, policy, beta=0.7, label_smoothing=smoothing)
        torch.testing.assert_close(found, torch.full((5,), math.log(2), dtype=torch.float64))


def test_losses_are_per_pair() -> None:
    """Each row is its own: a batch is its rows, unreduced."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = -10 * torch.rand(2, 7, 2, dtype=torch.float64, generator=generator)
    for loss in WITH_REFERENCE.values():
        rows = [loss(policy[i : i + 1], reference[i : i + 1]) for i in range(7)]
        torch.testing.assert_close(loss(policy, reference), torch.cat(rows), rtol=0, atol=0)
    for free in REFERENCE_FREE.values():
        torch.testing.assert_close(free(policy), torch.cat([free(policy[i : i + 1]) for i in range(7)]), rtol=0, atol=0)


@settings(deadline=None)
@given(h=st.floats(-50, 50), smoothing=st.floats(0, 0.45), beta=st.floats(0.01, 2))
def test_robust_dpo_is_unbiased(h: float, smoothing: float, beta: float) -> None:
    """Over flips of rate ε its expectation is the clean loss: (1-ε) robust(h) + ε robust(-h) = dpo(h)."""
    clean = robust_dpo_loss(*margin(h), beta=beta, label_smoothing=smoothing)
    flipped = robust_dpo_loss(*margin(-h), beta=beta, label_smoothing=smoothing)
    expectation = (1 - smoothing) * clean + smoothing * flipped
    torch.testing.assert_close(expectation, dpo_loss(*margin(h), beta=beta), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(h=st.floats(-50, 50), smoothing=st.floats(0, 0.5))
def test_conservative_dpo_is_the_expectation_over_flips(h: float, smoothing: float) -> None:
    """cDPO(h) = (1-ε) dpo(h) + ε dpo(-h); with ε = 1/2 the label tells nothing and the loss is even in h."""
    loss = partial(dpo_loss, beta=0.3)
    expected = (1 - smoothing) * loss(*margin(h)) + smoothing * loss(*margin(-h))
    torch.testing.assert_close(loss(*margin(h), label_smoothing=smoothing), expected)
    torch.testing.assert_close(loss(*margin(h), label_smoothing=0.5), loss(*margin(-h), label_smoothing=0.5))


@pytest.mark.parametrize("smoothing", [0.1, 0.25, 0.4])
def test_conservative_dpo_is_least_where_the_model_believes_the_noise_rate(smoothing: float) -> None:
    """d/dz [(1-ε) ℓ(z) + ε ℓ(-z)] = σ(z) - (1-ε) = 0 at z = log((1-ε)/ε)."""
    h = torch.tensor(math.log((1 - smoothing) / smoothing) / 0.1, dtype=torch.float64, requires_grad=True)
    policy = torch.stack([h, torch.zeros_like(h)])[None]
    dpo_loss(policy, torch.zeros(1, 2, dtype=torch.float64), beta=0.1, label_smoothing=smoothing).sum().backward()
    assert h.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_dpo_gradient_by_hand() -> None:
    """∂/∂policy_chosen = -β σ(-βh), ∂/∂policy_rejected the opposite (Rafailov et al. 2023, sec. 4).

    β = 0.5, h = 1: σ(-0.5) = 0.377541, so ∓0.188770.
    """
    policy = POLICY.clone().requires_grad_()
    dpo_loss(policy, REFERENCE, beta=0.5).sum().backward()
    assert policy.grad[0].tolist() == pytest.approx([-0.188770, 0.188770], abs=1e-6)


def test_ipo_is_least_at_its_target_margin() -> None:
    """At h = 1/(2β) the loss is 0, and it is quadratic: one nat away on either side costs 1."""
    for offset, expected in ((0.0, 0.0), (1.0, 1.0), (-1.0, 1.0)):
        assert ipo_loss(*margin(5.0 + offset), beta=0.1).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_gradients_of_losses_with_a_reference(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    policy, reference = -5 * torch.rand(2, 4, 2, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(WITH_REFERENCE[name], (policy.requires_grad_(), reference.requires_grad_()))


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_gradients_of_reference_free_losses(name: str) -> None:
    average = torch.tensor([[-0.1, -3.0], [-3.0, -0.1], [-12.0, -1.0], [-0.7, -0.69]], dtype=torch.float64)
    assert torch.autograd.gradcheck(REFERENCE_FREE[name], (average.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_extreme_log_ratios_stay_finite(name: str, dtype: torch.dtype) -> None:
    """h from -2e4 to 2e4. Losses that are lines there keep the line's value and slope."""
    policy = torch.tensor([[-1e4, -1.0], [-1.0, -1e4], [-1e4, -1e4], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    reference = torch.tensor([[-1.0, -1e4], [-1e4, -1.0], [-1.0, -1.0], [-1e4, -1e4]], dtype=dtype)
    losses = WITH_REFERENCE[name](policy, reference)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert policy.grad.isfinite().all()


def test_the_tails_of_dpo_are_lines() -> None:
    """β = 0.1, h = -19998: ℓ(-1999.8) = 1999.8 to rounding, slope -β; at h = +19998 both are 0."""
    policy = torch.tensor([[-1e4, -1.0], [-1.0, -1e4]], requires_grad=True)
    reference = policy.detach().flip(1)
    losses = dpo_loss(policy, reference, beta=0.1)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([1999.8, 0.0], rel=1e-6)
    assert policy.grad[:, 0].tolist() == pytest.approx([-0.1, 0.0], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_extreme_averages_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Every pair of averages from -1e4 to the largest below 0 and 0 itself, where the odds are infinite."""
    tiny = [-torch.finfo(dtype).tiny, -torch.finfo(dtype).eps / 4, -1e-3, -0.693, -30.0, -1e4]
    averages = torch.tensor([0.0, -0.0, *tiny], dtype=dtype)
    policy = torch.cartesian_prod(averages, averages).requires_grad_()
    losses = REFERENCE_FREE[name](policy)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert policy.grad.isfinite().all()


@settings(deadline=None)
@given(chosen=st.floats(-40, -1e-5), rejected=st.floats(-40, -1e-5))
def test_log_odds_ratio_in_float32_against_float64(chosen: float, rejected: float) -> None:
    """Against log(P/(1-P)) with log(1-P) from log1p or log(-expm1), each where it is accurate (Mächler 2012)."""

    def log_odds(p: float) -> float:
        return p - (math.log(-math.expm1(p)) if p > -math.log(2) else math.log1p(-math.exp(p)))

    policy = torch.tensor([[chosen, rejected]], dtype=torch.float32)
    exact = log_odds(policy[0, 0].item()) - log_odds(policy[0, 1].item())
    assert log_odds_ratio(policy).item() == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_a_better_chosen_answer_never_costs_more() -> None:
    """All losses but IPO (which has a target) and the smoothed one (likewise) fall as the chosen gains."""
    rising = torch.linspace(-9.0, -0.01, 200, dtype=torch.float64)
    policy = torch.stack([rising, torch.full_like(rising, -4.0)], dim=1)
    reference = torch.full_like(policy, -4.0)
    for name in ("dpo", "robust", "hinge"):
        assert (WITH_REFERENCE[name](policy, reference).diff() <= 0).all(), name
    for name, loss in REFERENCE_FREE.items():
        assert (loss(policy).diff() <= 0).all(), name
