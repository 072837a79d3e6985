"""Stochastic rounding from float32 to bf16.

bf16 keeps 8 of float32's 24 significant bits: a step smaller than 2⁻⁸ of its weight is lost by rounding to nearest,
every time. Rounded up with probability equal to the distance from the lower neighbour, the expectation of the stored
weight is the exact one, and small steps add up (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision";
for bf16 weights Zamirai et al. 2020, "Revisiting BFloat16 Training").
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Values rounded at once: bounds the temporaries (about 13 bytes a value)."""

_MASK64 = (1 << 64) - 1


def stochastic_round(source: Tensor, generator: torch.Generator) -> Tensor:
    """`source`, float32 of any shape, in bf16: each value one of its two bf16 neighbours, and E[result] = source.

    A bf16 is the upper half of a float32. Adding 16 uniform random bits to the float32's bits carries into that half
    with probability (lower half) / 2¹⁶, which is the distance to the lower neighbour; what remains below is cut off.
    Values that bf16 holds come back unchanged, signed zeros, infinities and NaN included. Beyond the largest finite
    bf16 (3.39e38) the upper neighbour is infinity, as in rounding to nearest. The bits come from `generator` (on
    `source`'s device) and nothing else.

    Raises TypeError if `source` is not float32.
    """
    if source.dtype != torch.float32:
        raise TypeError(f"stochastic_round takes float32, not {source.dtype}")
    result = torch.empty(source.shape, dtype=torch.bfloat16, device=source.device)
    for values, rounded in zip(source.reshape(-1).split(CHUNK), result.view(-1).split(CHUNK), strict=True):
        bits = random_bits16(values.numel(), generator)
        carried = values.view(torch.int32).add(bits).bitwise_and_(-1 << 16).view(torch.float32)
        rounded.copy_(torch.where(values.isnan(), values, carried))
    return result


def random_bits16(count: int, generator: torch.Generator) -> Tensor:
    """`count` integers uniform on 0 … 65535, as int32 (count,): four are cut from each 64-bit draw."""
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)


def generator_for(device: torch.device, *key: int) -> torch.Generator:
    """A generator whose stream is a function of the integers of `key` alone, such as (seed, step, tensor index).

    Nothing of it needs saving: a resumed run asks with the same key and gets the same bits.
    """
    state = 0
    for word in key:
        state = _mix64(state ^ (word & _MASK64))
    return torch.Generator(device).manual_seed(state >> 1)


def _mix64(value: int) -> int:
    """One step of splitmix64 (Steele et al. 2014): neighbouring integers become unrelated ones."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
