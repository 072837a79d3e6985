"""Stochastic rounding: between the neighbours, unbiased, a function of its key."""

from __future__ import annotations

import pytest
import torch

from tunelab.optim import rounding
from tunelab.optim.rounding import generator_for, random_bits16, stochastic_round

CPU = torch.device("cpu")


def _neighbours(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 below and above each value in magnitude, from float64 arithmetic and not from bits."""
    mantissa, exponent = torch.frexp(source.double())
    below = torch.ldexp(torch.trunc(mantissa * 256), exponent - 8)
    return below, torch.ldexp(torch.trunc(mantissa * 256) + mantissa.sign(), exponent - 8)


def test_each_value_goes_to_one_of_its_two_neighbours() -> None:
    source = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10
    below, above = _neighbours(source)
    rounded = stochastic_round(source, generator_for(CPU, 1)).double()
    assert bool(((rounded == below) | (rounded == above)).all())
    assert 0.4 < (rounded == above).double().mean().item() < 0.6  # neither always down nor always up


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.14159, 1e-30, 0.7 * 2**-133])
def test_the_mean_of_many_roundings_is_the_value(value: float) -> None:
    copies = 200_000
    source = torch.full((copies,), value)
    exact = source[0].double().item()
    rounded = stochastic_round(source, generator_for(CPU, 2)).double()
    spacing = (rounded.max() - rounded.min()).item()
    assert spacing > 0
    share_above = (exact - rounded.min().item()) / spacing
    error = spacing * (share_above * (1 - share_above) / copies) ** 0.5  # standard error of the mean
    assert abs(rounded.mean().item() - exact) < 4 * error


def test_what_bf16_holds_is_kept() -> None:
    held = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), 2.0**-133, 3.3895313892515355e38])
    rounded = stochastic_round(held.repeat(1000), generator_for(CPU, 3))
    assert torch.equal(rounded.view(torch.int16), held.bfloat16().repeat(1000).view(torch.int16))


def test_nan_stays_nan() -> None:
    bits = torch.tensor(
        [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -(2**23) + 1], dtype=torch.int32
    )  # both signs, all mantissas
    assert bool(bits.view(torch.float32).isnan().all())
    assert bool(stochastic_round(bits.view(torch.float32).repeat(1000), generator_for(CPU, 4)).isnan().all())


def test_steps_below_half_a_spacing_add_up() -> None:
    step, steps = 2.0**-12, 1024  # a sixteenth of the spacing above 1
    weight = torch.ones(4096, dtype=torch.bfloat16)
    for index in range(steps):
        weight = stochastic_round(weight.float() + step, generator_for(CPU, 5, index))
    assert weight.float().mean().item() == pytest.approx(1 + step * steps, rel=2e-3)
    assert (torch.ones(1, dtype=torch.bfloat16) + step).item() == 1.0  # what rounding to nearest makes of it


def test_bits_are_uniform_in_every_place() -> None:
    bits = random_bits16(100_003, generator_for(CPU, 6))
    assert bits.shape == (100_003,)
    assert bits.min() >= 0
    assert bits.max() < 1 << 16
    for place in range(16):
        assert ((bits >> place) & 1).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.corrcoef(torch.stack([bits[:-1].double(), bits[1:].double()]))[0, 1].abs() < 0.02


def test_the_stream_is_a_function_of_the_key() -> None:
    def stream(*key: int) -> torch.Tensor:
        return random_bits16(64, generator_for(CPU, *key))

    assert torch.equal(stream(1, 2, 3), stream(1, 2, 3))
    others = [(1, 2, 4), (1, 3, 3), (2, 2, 3), (3, 2, 1), (1, 2), (1, 2, 3, 0), (-1, 2, 3)]
    assert all(not torch.equal(stream(1, 2, 3), stream(*key)) for key in others)


def test_any_shape_and_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "CHUNK", 7)
    source = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).bfloat16().float().t()
    assert torch.equal(stochastic_round(source, generator_for(CPU, 7)).float(), source)
    assert stochastic_round(torch.tensor(1.5), generator_for(CPU, 8)).shape == ()
    assert stochastic_round(torch.empty(0, 3), generator_for(CPU, 8)).shape == (0, 3)


def test_only_float32_is_taken() -> None:
    with pytest.raises(TypeError, match="float32"):
        stochastic_round(torch.zeros(2, dtype=torch.float64), generator_for(CPU, 0))
