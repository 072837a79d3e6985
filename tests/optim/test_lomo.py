"""LOMO and AdaLomo against float64 transcriptions of the papers, and pytorch-optimizer's ports of the authors' code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.lean import check_equal, one_step, small_loaded, small_state, weights
from tunelab.config import SGDConfig, parse_recipe
from tunelab.config.optimizers import AdaLomoConfig, LOMOConfig
from tunelab.errors import ConfigError
from tunelab.optim.lomo import AdaLomo

SHAPES = [(6, 4), (3, 8), (5,), (1, 7)]
BASE = {"model": {"name": "tiny-gpt2"}, "data": {"train": "builtin:helpful-mini"}, "method": {"name": "sft"}}


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 10.0 ** (step % 3 - 2) for shape in SHAPES]


def starting_weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(99)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype) * 0.1) for shape in SHAPES]


def in_float64(steps: int, lr: float, weight_decay: float) -> list[Tensor]:
    """Lv et al. 2023b, algorithm 1, with the authors' ε₁, ε₂ and threshold."""
    weights = [parameter.detach().double() for parameter in starting_weights()]
    rows: dict[int, Any] = {}
    columns: dict[int, Any] = {}
    for step in range(1, steps + 1):
        beta = 1 - step**-0.8
        for number, gradient in enumerate(g.double() for g in gradients(step)):
            squared = gradient**2 + 1e-30
            if gradient.ndim == 2:
                rows[number] = beta * rows.get(number, 0) + (1 - beta) * squared.mean(1)
                columns[number] = beta * columns.get(number, 0) + (1 - beta) * squared.mean(0)
                second = torch.outer(rows[number], columns[number]) / rows[number].mean()
            else:
                second = rows[number] = beta * rows.get(number, 0) + (1 - beta) * squared
            update = gradient / second.sqrt()
            update /= max(1.0, update.square().mean().sqrt().item())
            weight = weights[number]
            rate = lr * max(1e-3, weight.square().mean().sqrt().item())
            weights[number] = weight - rate * (update + weight_decay * weight)
    return weights


def test_adalomo_is_the_papers_update_for_20_steps() -> None:
    parameters = starting_weights()
    optimizer = AdaLomo(parameters, lr=0.01, weight_decay=0.1)
    for step in range(1, 21):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    for found, expected in zip(parameters, in_float64(20, 0.01, 0.1), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_adalomo_is_the_ported_code_of_its_authors() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    theirs = nn.ParameterList(starting_weights())
    other = pytorch_optimizer.AdaLOMO(theirs, lr=0.01, weight_decay=0.1, loss_scale=0.0)
    parameters = starting_weights()
    optimizer = AdaLomo(parameters, lr=0.01, weight_decay=0.1)
    for step in range(1, 21):
        other.num_steps = step  # what fused_backward counts
        for parameter, twin, gradient in zip(parameters, theirs, gradients(step), strict=True):
            parameter.grad, twin.grad = gradient.clone(), gradient.clone()
        other.grad_func(0)
        optimizer.step()
    for found, expected in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-7)


def test_adalomo_keeps_rows_and_columns_only() -> None:
    parameters = starting_weights()
    optimizer = AdaLomo(parameters, lr=0.01)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in parameters:
        kept = sum(v.numel() for v in optimizer.state[parameter].values() if isinstance(v, Tensor))
        assert kept == (sum(parameter.shape) if parameter.ndim == 2 else parameter.numel())


def test_adalomo_learns() -> None:
    """A linear map of 6 inputs to 4 outputs, from noise-free examples."""
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(64, 6, generator=generator), torch.randn(6, 4, generator=generator)
    parameter = nn.Parameter(torch.randn(6, 4, generator=generator) * 0.1)
    optimizer = AdaLomo([parameter], lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        loss = (inputs @ (parameter - wanted)).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


def test_lomo_is_sgd_in_the_backward_pass() -> None:
    plain, fused = small_loaded(), small_loaded()
    one, two = small_state(plain, SGDConfig()), small_state(fused, LOMOConfig(), releases=True)
    for _ in range(3):
        assert one_step(one)["train/loss"] == one_step(two)["train/loss"]
    check_equal(weights(plain), weights(fused))
    assert not any(state for state in two.optimizer.state.values()), "and no state"


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_they_switch_gradient_release_on(name: str) -> None:
    training = parse_recipe({**BASE, "optimizer": {"name": name}}).training
    assert training.gradient_release
    assert training.max_grad_norm is None
    assert math.isfinite(AdaLomoConfig().learning_rate)


@pytest.mark.parametrize(
    ("name", "training", "message"),
    [
        (
            "lomo",
            {"gradient_release": False},
            "lomo updates in the backward pass; .* use sgd, which is the same update",
        ),
        ("adalomo", {"gradient_release": False}, "adalomo updates in the backward pass; .* use adafactor"),
        ("adalomo", {"max_grad_norm": 1.0}, "set training.max_grad_norm: null"),
        ("adamw", {"gradient_release": True}, "set training.max_grad_norm: null"),
        (
            "adamw",
            {"gradient_release": True, "max_grad_norm": None, "gradient_accumulation_steps": 2},
            "set training.gradient_accumulation_steps: 1",
        ),
    ],
)
def test_what_release_cannot_do_is_refused_with_the_mend(name: str, training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe({**BASE, "optimizer": {"name": name}, "training": training})
