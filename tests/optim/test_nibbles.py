"""Moments in 4 bits: between neighbouring levels, unbiased, packed two a byte."""

from __future__ import annotations

import pytest
import torch

from tunelab.optim.nibbles import (
    BLOCK,
    decode_momentum,
    decode_square,
    encode_momentum,
    encode_square,
    nibbles_shape,
    scales_shape,
)
from tunelab.optim.rounding import generator_for

MOMENTUM_LEVELS = torch.tensor([(k / 7) ** 2 for k in range(8)])
SQUARE_LEVELS = torch.tensor([((k + 1) / 16) ** 4 for k in range(16)])


def _kept(values: torch.Tensor, kind: str, key: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes back of `values`, and each value's scale."""
    encode, decode = (encode_momentum, decode_momentum) if kind == "momentum" else (encode_square, decode_square)
    codes = torch.empty(nibbles_shape(*values.shape), dtype=torch.uint8)
    scales = torch.empty(scales_shape(*values.shape))
    encode(values, codes, scales, generator_for(torch.device("cpu"), key))
    return decode(codes, scales, values.shape[1]), scales.repeat_interleave(BLOCK, dim=1)[:, : values.shape[1]]


def _values(kind: str, columns: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(50, columns, generator=random) * torch.randn(50, 1, generator=random).exp()
    values[3] = 0.0
    return values if kind == "momentum" else values.square()


@pytest.mark.parametrize("kind", ["momentum", "square"])
@pytest.mark.parametrize("columns", [1, 2, 127, 128, 300])
def test_each_value_goes_to_one_of_its_two_levels(kind: str, columns: int) -> None:
    values = _values(kind, columns)
    found, scales = _kept(values, kind)
    assert found.shape == values.shape
    levels = MOMENTUM_LEVELS if kind == "momentum" else SQUARE_LEVELS
    shares = (values.abs() / scales.clamp_min(1e-30)).clamp(levels[0], 1.0)
    above = torch.bucketize(shares * (1 - 1e-6), levels).clamp(0, len(levels) - 1)
    below = (torch.bucketize(shares * (1 + 1e-6), levels, right=True) - 1).clamp(0, len(levels) - 1)
    least, most = levels[below] * scales * (1 - 1e-5), levels[above] * scales * (1 + 1e-5)
    assert bool(((least <= found.abs()) & (found.abs() <= most)).all())
    assert bool((found * values >= 0).all())
    assert bool((found[3] == 0).all())
    assert torch.allclose(found.abs().amax(1), values.abs().amax(1), rtol=1e-6)  # the largest of a block is kept


@pytest.mark.parametrize("kind", ["momentum", "square"])
def test_the_mean_of_what_is_kept_is_the_value(kind: str) -> None:
    """Except for squares below the lowest level, which rise to it."""
    row = torch.linspace(0.0, 1.0, BLOCK)
    copies = 20_000
    found, _ = _kept(row.repeat(copies, 1), kind)
    error = found.std(0) / copies**0.5
    expected = row.clamp_min(SQUARE_LEVELS[0]) if kind == "square" else row
    assert bool(((found.mean(0) - expected).abs() <= 4.5 * error + 1e-6).all())


@pytest.mark.parametrize("kind", ["momentum", "square"])
def test_levels_are_kept(kind: str) -> None:
    levels = torch.cat([-MOMENTUM_LEVELS, MOMENTUM_LEVELS]) if kind == "momentum" else SQUARE_LEVELS
    for scale in (1e-6, 1.0, 3e4):
        values = levels[None] * scale
        torch.testing.assert_close(_kept(values, kind)[0], values, rtol=1e-5, atol=0)


def test_a_running_mean_moves_where_rounding_to_nearest_would_not() -> None:
    """β = 0.999, and what is new is half of what is there: after 200 steps 10% less."""
    values = torch.ones(400, BLOCK)
    values[:, 1:] = SQUARE_LEVELS[12]
    for step in range(200):
        values, _ = _kept(values, "square", step)
        values[:, 0] = 1.0
        values[:, 1:].lerp_(SQUARE_LEVELS[12] / 2, 1e-3)
    expected = SQUARE_LEVELS[12] * (0.5 + 0.5 * 0.999**200)
    assert values[:, 1:].mean().item() == pytest.approx(expected.item(), rel=0.01)


def test_two_values_take_a_byte() -> None:
    assert nibbles_shape(3, 5) == (3, 3)
    assert scales_shape(3, 129) == (3, 2)
