"""Objectives over packed rows: sums by sequence, weights, metrics, and that splitting a batch changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tunelab.config import DPOConfig, SFTConfig
from tunelab.objectives import build_objective, count_by_sequence, sum_by_sequence
from tunelab.types import Batch

METHODS = {
    "sft": SFTConfig(),
    "sigmoid": DPOConfig(),
    "conservative": DPOConfig(label_smoothing=0.1),
    "robust": DPOConfig(loss="robust", label_smoothing=0.1),
    "ipo": DPOConfig(loss="ipo"),
    "ipo mean": DPOConfig(loss="ipo", ipo_normalization="mean"),
    "hinge": DPOConfig(loss="hinge"),
    "simpo": DPOConfig(loss="simpo", beta=2.0),
    "orpo": DPOConfig(loss="orpo"),
}
PAIR_METRICS = {
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
}  # fmt: skip


def batch_of(lengths: list[int]) -> Batch:
    """A batch whose sequences have these many targets. Objectives read nothing else of it."""
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    size = len(owners)
    zeros = torch.zeros(size, dtype=torch.int64)
    return Batch(zeros, zeros, (), torch.arange(size), zeros, owners, len(lengths), tuple(range(len(lengths))))


def two_pairs() -> tuple[Tensor, Batch, Tensor]:
    """Sequences of 2, 1, 3 and 2 targets with sums -3, -2, -3 and -8; the reference likes all at -4."""
    logprobs = torch.tensor([-1.0, -2.0, -2.0, -0.5, -0.5, -2.0, -3.0, -5.0], dtype=torch.float64)
    return logprobs, batch_of([2, 1, 3, 2]), torch.full((2, 2), -4.0, dtype=torch.float64)


def test_sums_and_counts_by_sequence() -> None:
    logprobs, batch, _ = two_pairs()
    assert sum_by_sequence(logprobs, batch).tolist() == [-3.0, -2.0, -3.0, -8.0]
    assert count_by_sequence(batch).tolist() == [2, 1, 3, 2]


def test_sums_accumulate_in_float32_and_do_not_need_order() -> None:
    """4096 times -1/256 in bf16 is -16 exactly; a bf16 accumulator stops growing at -1. Targets may be shuffled."""
    batch = batch_of([4096, 1])
    order = torch.randperm(4097, generator=torch.Generator().manual_seed(0))
    logprobs = torch.full((4097,), -1 / 256, dtype=torch.bfloat16)
    shuffled = Batch(**{**vars(batch), "sequence_ids": batch.sequence_ids[order]})
    found = sum_by_sequence(logprobs, shuffled)
    assert found.dtype == torch.float32
    assert found.tolist() == [-16.0, -1 / 256]


def test_a_sequence_gets_gradients_of_its_own_sum_only() -> None:
    logprobs, batch, _ = two_pairs()
    logprobs.requires_grad_()
    sum_by_sequence(logprobs, batch)[2].backward()
    assert logprobs.grad.tolist() == [0, 0, 0, 1, 1, 1, 0, 0]


def test_a_broken_sequence_does_not_break_the_others() -> None:
    logprobs, batch, _ = two_pairs()
    logprobs[0] = math.nan
    assert sum_by_sequence(logprobs, batch)[1:].tolist() == [-2.0, -3.0, -8.0]


def test_sft_is_the_sum_over_targets() -> None:
    """-(-3 - 2 - 3 - 8) = 16 over 8 targets: 2 nats a token."""
    logprobs, batch, _ = two_pairs()
    objective = build_objective(SFTConfig())
    loss, metrics = objective.loss_sum(logprobs.requires_grad_(), batch, None)
    assert objective.weight(batch).item() == 8
    assert loss.item() == 16.0
    assert metrics["nll"].item() == 16.0
    assert not objective.needs_reference
    loss.backward()
    assert logprobs.grad.tolist() == [-1.0] * 8


def test_dpo_metrics_by_hand() -> None:
    """Log-ratios to the reference's -4: pair one 1 and 2 (margin -1), pair two 1 and -4 (margin 5). β = 0.1.

    loss = log(1 + e^0.1) + log(1 + e^-0.5) = 0.744397 + 0.474077; rewards/chosen = 0.1 (1 + 1) = 0.2;
    rewards/rejected = 0.1 (2 - 4) = -0.2; margins 0.4; one pair of two is right; logps -3 - 3 and -2 - 8.
    """
    logprobs, batch, reference = two_pairs()
    objective = build_objective(DPOConfig(beta=0.1))
    loss, metrics = objective.loss_sum(logprobs, batch, reference)
    assert objective.needs_reference
    assert objective.weight(batch).item() == 2
    assert loss.item() == pytest.approx(0.744397 + 0.474077, abs=1e-6)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 0.2,
            "rewards/rejected": -0.2,
            "rewards/margins": 0.4,
            "rewards/accuracies": 1.0,
            "logps/chosen": -6.0,
            "logps/rejected": -10.0,
        }
    )


def test_a_tie_is_half_right() -> None:
    logprobs, batch, _ = two_pairs()
    policy = sum_by_sequence(logprobs, batch).view(2, 2)
    _, metrics = build_objective(DPOConfig()).loss_sum(logprobs, batch, policy)
    assert metrics["rewards/accuracies"].item() == 1.0  # two pairs, half a point each


def test_ipo_averages_policy_and_reference_when_asked() -> None:
    """Log-ratios 1, 2 and 1, -4 over 2, 1, 3 and 2 targets: averages 0.5, 2 and 1/3, -2; h = -1.5 and 7/3.

    β = 0.1: (-1.5 - 5)² + (7/3 - 5)² = 42.25 + 7.111111; of sums: (-1 - 5)² + (5 - 5)² = 36.
    """
    inputs = two_pairs()
    mean, _ = build_objective(DPOConfig(loss="ipo", ipo_normalization="mean")).loss_sum(*inputs)
    total, _ = build_objective(DPOConfig(loss="ipo")).loss_sum(*inputs)
    explicit, _ = build_objective(DPOConfig(loss="ipo", ipo_normalization="sum")).loss_sum(*inputs)
    assert mean.item() == pytest.approx(42.25 + 64 / 9)
    assert total.item() == explicit.item() == pytest.approx(36.0)


def test_simpo_reads_averages_and_defaults_gamma() -> None:
    """Averages -1.5, -2 and -1, -4. β = 2, γ = 0.5: ℓ(2 · 0.5 - 0.5) + ℓ(2 · 3 - 0.5) = 0.474077 + 0.004078.

    Rewards are 2 × the averages: chosen -5, rejected -12 summed; logps stay sums.
    """
    logprobs, batch, _ = two_pairs()
    objective = build_objective(DPOConfig(loss="simpo", beta=2.0))
    loss, metrics = objective.loss_sum(logprobs, batch, None)
    assert loss.item() == pytest.approx(0.474077 + 0.004078, abs=1e-6)
    assert metrics["rewards/chosen"].item() == pytest.approx(-5.0)
    assert metrics["rewards/rejected"].item() == pytest.approx(-12.0)
    assert metrics["rewards/accuracies"].item() == 2.0
    assert metrics["logps/chosen"].item() == pytest.approx(-6.0)
    with_gamma, _ = build_objective(DPOConfig(loss="simpo", beta=2.0, simpo_gamma=0.0)).loss_sum(logprobs, batch, None)
    assert with_gamma.item() == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(-6)))


def test_orpo_metrics_by_hand() -> None:
    """Two tokens of log 1/2 against one of log 1/4: NLL log 2, log odds ratio log 3 (see test_preference)."""
    logprobs = torch.tensor([0.5, 0.5, 0.25], dtype=torch.float64).log()
    loss, metrics = build_objective(DPOConfig(loss="orpo", beta=0.1)).loss_sum(logprobs, batch_of([2, 1]), None)
    assert loss.item() == pytest.approx(0.721915, abs=1e-6)
    assert metrics["nll/chosen"].item() == pytest.approx(math.log(2))
    assert metrics["log_odds_ratio"].item() == pytest.approx(math.log(3))
    assert metrics["logps/chosen"].item() == pytest.approx(2 * math.log(0.5))


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_detached_scalars_of_the_stated_names(name: str) -> None:
    logprobs, batch, reference = two_pairs()
    objective = build_objective(METHODS[name])
    loss, metrics = objective.loss_sum(
        logprobs.requires_grad_(), batch, reference if objective.needs_reference else None
    )
    expected = (
        {"nll"} if name == "sft" else PAIR_METRICS | ({"nll/chosen", "log_odds_ratio"} if name == "orpo" else set())
    )
    assert metrics.keys() == expected
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert loss.shape == ()
    assert loss.requires_grad
    assert objective.weight(batch).shape == ()


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_split_in_two_adds_up(name: str) -> None:
    """Loss, gradient, weight and metrics of six records at once equal the sums of one and five (float64, 1e-12)."""
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    logprobs = -3 * torch.rand(sum(lengths), dtype=torch.float64, generator=generator)
    reference = -20 * torch.rand(6, 2, dtype=torch.float64, generator=generator)
    objective = build_objective(METHODS[name])

    def measure(first: int, last: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        start, stop = sum(lengths[: 2 * first]), sum(lengths[: 2 * last])
        part = logprobs[start:stop].clone().requires_grad_()
        batch = batch_of(lengths[2 * first : 2 * last])
        loss, metrics = objective.loss_sum(part, batch, reference[first:last] if objective.needs_reference else None)
        loss.backward()
        return loss.detach(), part.grad, objective.weight(batch), metrics

    whole, head, tail = measure(0, 6), measure(0, 1), measure(1, 6)
    torch.testing.assert_close(head[0] + tail[0], whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([head[1], tail[1]]), whole[1], rtol=1e-12, atol=1e-12)
    assert (head[2] + tail[2]).item() == whole[2].item()
    for metric, value in whole[3].items():
        torch.testing.assert_close(head[3][metric] + tail[3][metric], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_objectives_need_no_reading_of_the_device(name: str) -> None:
    """Meta tensors have no values: any `.item()`, data-dependent shape or branch would raise."""
    logprobs, batch, reference = (x.to("meta") for x in two_pairs())
    objective = build_objective(METHODS[name])
    loss, metrics = objective.loss_sum(logprobs, batch, reference if objective.needs_reference else None)
    assert {loss.device.type, objective.weight(batch).device.type, *(m.device.type for m in metrics.values())} == {
        "meta"
    }
