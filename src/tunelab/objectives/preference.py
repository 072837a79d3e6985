"""Preference losses: pure, unreduced functions of sequence log-probabilities.

`policy` and `reference` are (P, 2): column 0 the chosen, column 1 the rejected completion of each pair. Every
function returns (P,). Throughout,

    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)

is the difference of the log-ratios, and ℓ(z) = -log σ(z). All are finite, with finite gradients, for finite input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_ratio_margin(policy: Tensor, reference: Tensor) -> Tensor:
    """h of the module docstring: (P, 2), (P, 2) → (P,)."""
    log_ratios = policy - reference
    return log_ratios[:, 0] - log_ratios[:, 1]


def dpo_loss(policy: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation, and with `label_smoothing` ε > 0 its conservative form.

        (1-ε) ℓ(βh) + ε ℓ(-βh)

    ε = 0 is Rafailov et al. 2023, "Direct Preference Optimization", eq. 7. ε is the probability that a label is
    flipped: Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO", eq. 3; the loss is then
    least where σ(βh) = 1-ε. TRL ignores `label_smoothing` for its `sigmoid` loss (since 0.29, still in 1.16).
    """
    logits = beta * log_ratio_margin(policy, reference)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust_dpo_loss(policy: Tensor, reference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: an unbiased estimate of the clean DPO loss when a fraction ε < 1/2 of the labels is flipped.

        ((1-ε) ℓ(βh) - ε ℓ(-βh)) / (1-2ε)

    Chowdhury, Kini & Natarajan 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback".
    Unlike the conservative form it falls without bound as h grows (slope -βε/(1-2ε)): negative values are correct.
    """
    logits = beta * log_ratio_margin(policy, reference)
    clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation: (h - 1/(2β))², with β the paper's τ.

    Azar et al. 2024, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17, where
    h is of *summed* log-probabilities. TRL and HALOs average each completion over its tokens instead (their authors
    report the paper's experiments did so too): for that, pass `policy` and `reference` already averaged.
    """
    return (log_ratio_margin(policy, reference) - 1 / (2 * beta)) ** 2


def hinge_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """max(0, 1 - βh).

    The calibration loss of Zhao et al. 2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", eq. 1,
    with its margin δ = 1 and log-likelihoods taken relative to the reference and scaled by β, as in Liu et al.
    2024, "Statistical Rejection Sampling Improves Preference Optimization". SLiC's cross-entropy regulariser is left
    out: the reference takes its place.
    """
    return torch.relu(1 - beta * log_ratio_margin(policy, reference))


def simpo_loss(policy_average: Tensor, beta: float, gamma: float) -> Tensor:
    """Simple preference optimisation: ℓ(β (r_chosen - r_rejected) - γ), r the average log-probability of a token.

    Meng, Xia & Chen 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", eq. 6. `gamma` is
    the paper's target reward margin γ itself (as `simpo_gamma` of TRL's CPO trainer), not the ratio γ/β that the
    authors' code calls `gamma_beta_ratio`.
    """
    return -F.logsigmoid(beta * (policy_average[:, 0] - policy_average[:, 1]) - gamma)


def orpo_loss(policy_average: Tensor, beta: float) -> Tensor:
    """Odds ratio preference optimisation: NLL of the chosen completion + λ ℓ(log odds ratio), λ = `beta`.

    Hong, Lee & Thorne 2024, "ORPO: Monolithic Preference Optimization without Reference Model", eqs. 6 and 7, on
    length-averaged log-probabilities (eq. 3). The NLL is of the completion's tokens and averaged per sequence;
    TRL's experimental trainer takes it over the prompt too and averages over the tokens of the whole batch.
    """
    return -policy_average[:, 0] - beta * F.logsigmoid(log_odds_ratio(policy_average))


def log_odds_ratio(policy_average: Tensor) -> Tensor:
    """log(odds(chosen) / odds(rejected)), odds(y) = P(y) / (1 - P(y)): (P, 2) average log-probabilities → (P,).

    log(1 - P) is log(-expm1(log P)): exact for P near 1, and for small P wrong by less than the rounding of the
    log P it is subtracted from. P is held one machine epsilon below 1, where the odds are infinite.
    """
    below_one = policy_average.clamp(max=-torch.finfo(policy_average.dtype).eps)
    log_odds = policy_average - torch.log(-torch.expm1(below_one))
    return log_odds[:, 0] - log_odds[:, 1]
