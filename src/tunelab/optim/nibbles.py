"""Adam's moments in 4 bits a value, rounded stochastically, so that what is kept is the moment on average.

Dettmers et al. 2022 ("8-bit Optimizers via Block-wise Quantization") and Li et al. 2023 ("Memory Efficient Optimizers
with 4-bit States") keep blocks of neighbours with a scale each, their largest magnitude. So do we: `BLOCK` values of
a row, one float32. Their levels are rounded to nearest. A running mean moves by (1 − β) of what is new, which for
β₂ = 0.999 is far less than half the distance between two of 16 levels: rounded to nearest it would never move. Rounded
up with probability equal to the distance from the lower level, it moves the right way on average (`rounding.py` does
the same to weights). There is no level at 0 for the second moment, because it is divided by (Li et al., §4.1).

    momentum, of x = m / scale in [−1, 1]:          sign · (k/7)²,       k = 0 … 7
    second moment, of x = v / scale in [0, 1]:      ((k + 1)/16)⁴,       k = 0 … 15;  √v down to 1/256 of the largest

Levels are dense near 0, where most of a block lies. What is below the lowest second moment is rounded up to it: a
smaller step, never a larger one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tunelab.optim.rounding import random_bits16

BLOCK = 128
"""Neighbours in a row that share a scale."""

TINY = 1e-38
"""In place of the scale of a block of zeros."""


def nibbles_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the uint8 tensor that holds (rows, columns) values, two a byte."""
    return rows, -(-columns // 2)


def scales_shape(rows: int, columns: int) -> tuple[int, int]:
    return rows, -(-columns // BLOCK)


def encode_momentum(values: Tensor, codes: Tensor, scales: Tensor, generator: torch.Generator) -> None:
    """float32 (n, m) into `codes` uint8 (n, ⌈m/2⌉) and `scales` float32 (n, ⌈m/128⌉)."""
    shares = _scaled(values, scales)
    root = shares.abs().sqrt_().mul_(7)
    low = root.floor().clamp_(max=6)
    chance = root.square_().sub_(low.square()).div_(low * 2 + 1)  # ((k+1)² − k²) = 2k + 1
    codes.copy_(_packed(_either(low, chance, generator).copysign_(shares).add_(7), values.shape[1]))


def decode_momentum(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """What `encode_momentum` kept, float32 (n, columns)."""
    roots = _unpacked(codes, columns).sub_(7)
    return _rescaled(roots.mul_(roots.abs()).div_(49), scales)


def encode_square(values: Tensor, codes: Tensor, scales: Tensor, generator: torch.Generator) -> None:
    """As `encode_momentum`, of values ≥ 0."""
    root = _scaled(values, scales).sqrt_().sqrt_().mul_(16)
    low = root.floor().clamp_(1, 15)
    fourth = low.square().square_()
    chance = root.square_().square_().sub_(fourth).div_((low + 1).square_().square_().sub_(fourth))
    codes.copy_(_packed(_either(low, chance, generator).sub_(1), values.shape[1]))


def decode_square(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """What `encode_square` kept, float32 (n, columns)."""
    return _rescaled(_unpacked(codes, columns).add_(1).div_(16).square_().square_(), scales)


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    """Each block's values over its largest magnitude, which goes into `scales`: (n, blocks, 128), padded with 0."""
    blocks = F.pad(values, (0, -values.shape[1] % BLOCK)).view(values.shape[0], -1, BLOCK)
    torch.amax(blocks.abs(), dim=2, out=scales)
    return blocks / scales.clamp_min(TINY)[..., None]


def _rescaled(shares: Tensor, scales: Tensor) -> Tensor:
    """`_scaled` undone. shares: (n, m)."""
    num_rows, num_columns = shares.shape
    if num_columns % BLOCK == 0:
        return shares.view(num_rows, -1, BLOCK).mul_(scales[..., None]).view(num_rows, num_columns)
    return shares.mul_(scales.repeat_interleave(BLOCK, dim=1)[:, :num_columns])


def _either(low: Tensor, chance: Tensor, generator: torch.Generator) -> Tensor:
    """`low`, or with probability `chance` (in units of 2⁻¹⁶) the level above."""
    bits = random_bits16(low.numel(), generator).view(low.shape)
    return low.add_(bits < chance.mul_(65536))


def _packed(codes: Tensor, columns: int) -> Tensor:
    """(n, blocks, 128) floats 0 … 15 → (n, ⌈columns/2⌉) uint8: even columns in the low half."""
    small = codes.to(torch.uint8).view(codes.shape[0], -1)
    return (small[:, 0::2] | small[:, 1::2] << 4)[:, : -(-columns // 2)]


def _unpacked(packed: Tensor, columns: int) -> Tensor:
    """(n, ⌈columns/2⌉) uint8 → (n, columns) floats."""
    return torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1)[:, :columns].float()
