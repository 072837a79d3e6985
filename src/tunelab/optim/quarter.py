"""Quarter: AdamW's step in a quarter of its memory, at most 4 bytes a parameter with weights and gradients.

For a matrix W (n, m) with gradient G at step t, all arithmetic in float32:

    r ← β₂ r + (1 − β₂) mean_j G²,   c ← β₂ c + (1 − β₂) mean_i G²              (n,), (m,)
    U = G / √V,   V = r cᵀ / (mean(r) (1 − β₂ᵗ))                                 Adafactor, eq. 4 with Adam's β₂
    U ← U / max(1, RMS(U) / d)                                                   Adafactor, §6: in place of clipping
    M ← β₁ M + (1 − β₁) U,                                                       CAME's and Adafactor's momentum
    W ← W − η (M / (1 − β₁ᵗ) + λ W)                                              AdamW, algorithm 2
    M is kept in 8 bits, blocks of 128 with one scale                            8-bit optimizers, §2
    W, if bf16, is rounded stochastically                                        rounding.py

Adafactor: Shazeer & Stern 2018; CAME: Luo et al. 2023; AdamW: Loshchilov & Hutter 2019; 8-bit: Dettmers et al. 2022.
Vectors (biases, norms: 0.1% of a model) are plain AdamW with float32 moments.

Bytes a parameter: 2 of W, 1.03 of M, 4 (n + m) / nm of r and c. With `training.gradient_release` gradients live one
tensor at a time, so that their peak is the tied embedding's 2 bytes (31% of GPT-2: 0.62) and half a block's. Nothing
here depends on a second parameter, no global norm and no shared statistic: that is what release asks for. A matrix is
updated some rows at a time, so that float32 exists for `CHUNK` values and not for an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunelab.optim.rounding import generator_for, stochastic_round

BLOCK = 128
"""Neighbours in a row that share a scale."""

CHUNK = 1 << 18
"""Values of a matrix in float32 at once, in whole rows."""

TINY = 1e-38
"""In place of a zero mean or scale. Where the mean square is 0, so is the gradient."""


class Quarter(torch.optim.Optimizer):
    """The update above, of float32 and bf16 parameters. Takes everything as torch's AdamW, and:

    clip_threshold: the largest root mean square of U (d). seed: random bits of the rounding are a function of (seed,
    step, number of the parameter); nothing else is random, so a resumed run goes on with the same bits.

    State of a matrix: `step` (int), `codes` int8 (n, m), `scales` float32 (n, ⌈m/128⌉), `rows` (n,), `columns` (m,);
    of a vector: `step`, `exp_avg`, `exp_avg_sq`. Raises TypeError for parameters of any other dtype.
    """

    rounds_stochastically = True
    """bf16 parameters are to be handed over as they are, not as float32 copies."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._numbers: dict[int, int] = {}
        self.seed = seed
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_threshold": clip_threshold},
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(f"quarter trains float32 and bf16 parameters, not {parameter.dtype}")
            self._numbers[id(parameter)] = len(self._numbers)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; each alone, in any order, comes to the same."""
        if closure is not None:
            raise ValueError("quarter takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                generator = generator_for(parameter.device, self.seed, state["step"], self._numbers[id(parameter)])
                update = _update_matrix if parameter.ndim >= 2 else _update_vector
                update(parameter, parameter.grad, state, group, generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its dtype: torch would cast all state to that of the parameter."""
        super().load_state_dict(state_dict)
        numbered = state_dict["state"]
        saved_numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved_numbers, parameters, strict=True):
            for name, value in numbered.get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().clone().to(parameter.device)


def quarter_state_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of the state tensors of a parameter of `shape`, whatever its dtype."""
    if len(shape) < 2:
        return 8 * math.prod(shape)
    rows, columns = shape[0], math.prod(shape[1:])
    return rows * columns + 4 * rows * -(-columns // BLOCK) + 4 * (rows + columns)


def _update_vector(
    parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], generator: torch.Generator
) -> None:
    """AdamW, algorithm 2. gradient: (n,) or ()."""
    gradient = gradient.float()
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    beta1, beta2 = group["betas"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - beta1)
    square.lerp_(gradient.square(), 1 - beta2)
    root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
    _move(parameter.data, (mean / root).div_(1 - beta1 ** state["step"]), group, generator)


def _update_matrix(
    parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], generator: torch.Generator
) -> None:
    """The module's equations. gradient: (n, m), or (n, …) with all but the first dimension taken as one."""
    gradient, weight = gradient.flatten(1), parameter.data.flatten(1)
    if "codes" not in state:
        _start_matrix(state, gradient)
    beta1, beta2 = group["betas"]
    correction = 1 - beta1 ** state["step"]
    row_factor, column_factor = _whitening(gradient, state, beta2, group["clip_threshold"])
    for rows in _chunks(gradient):
        update = _float32(gradient[rows]).mul_(row_factor[rows, None]).mul_(column_factor)
        momentum = decode(state["codes"][rows], state["scales"][rows]).lerp_(update, 1 - beta1)
        encode(momentum, state["codes"][rows], state["scales"][rows])
        _move(weight[rows], momentum.div_(correction), group, generator)


def _start_matrix(state: dict[str, Any], gradient: Tensor) -> None:
    num_rows, num_columns = gradient.shape
    state["codes"] = gradient.new_zeros(num_rows, num_columns, dtype=torch.int8)
    state["scales"] = gradient.new_zeros(num_rows, -(-num_columns // BLOCK), dtype=torch.float32)
    state["rows"] = gradient.new_zeros(num_rows, dtype=torch.float32)
    state["columns"] = gradient.new_zeros(num_columns, dtype=torch.float32)


def _whitening(gradient: Tensor, state: dict[str, Any], beta2: float, clip_threshold: float) -> tuple[Tensor, Tensor]:
    """a (n,), b (m,) such that U = G ∘ a bᵀ, clipped; the factors of the second moment are brought up to date.

    As V has rank 1, so has 1/√V: no matrix of it is ever made, and RMS(U)² = aᵀ² G² b² / nm.
    """
    num_rows, num_columns = gradient.shape
    columns = torch.zeros_like(state["columns"])
    for rows in _chunks(gradient):
        squared = _float32(gradient[rows]).square_()
        state["rows"][rows].lerp_(squared.mean(1), 1 - beta2)
        columns += squared.sum(0)
    state["columns"].lerp_(columns.div_(num_rows), 1 - beta2)
    unbiased = 1 - beta2 ** state["step"]
    row_factor = (state["rows"] / state["rows"].mean().clamp_min(TINY)).clamp_min_(TINY).rsqrt_()
    column_factor = (state["columns"] / unbiased).clamp_min_(TINY).rsqrt_()
    total = gradient.new_zeros((), dtype=torch.float32)
    for rows in _chunks(gradient):
        total += _float32(gradient[rows]).mul_(row_factor[rows, None]).mul_(column_factor).square_().sum()
    clipping = (total / (num_rows * num_columns)).sqrt_().div_(clip_threshold).clamp_min_(1.0)
    return row_factor, column_factor.div_(clipping)


def _move(weight: Tensor, direction: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
    """weight ← weight − η (direction + λ weight), in place; bf16 rounded stochastically. Uses up `direction`."""
    moved = weight.float().mul(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
    weight.copy_(stochastic_round(moved, generator) if weight.dtype == torch.bfloat16 else moved)


def _float32(tensor: Tensor) -> Tensor:
    """A copy, also where it is float32 already."""
    return tensor.to(torch.float32, copy=True)


def _chunks(matrix: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // max(1, matrix.shape[1]))
    return (slice(start, start + rows) for start in range(0, matrix.shape[0], rows))


# --- momentum in 8 bits ---------------------------------------------------------------------------------------------


def encode(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """float32 (n, m) into `codes` int8 (n, m) and `scales` (n, ⌈m/128⌉), the largest magnitude of each block.

    With x = value / scale the code is round(127 sign(x) √|x|): spacings shrink towards 0 as |x| does, where most of a
    block lies, and the smallest nonzero magnitude is 1/127² of the largest (Dettmers' dynamic map has the same aim).
    The error is at most √x/127 + 1/127²/4 of the scale.
    """
    num_rows, num_columns = values.shape
    blocks = F.pad(values, (0, -num_columns % BLOCK)).view(num_rows, -1, BLOCK)
    torch.amax(blocks.abs(), dim=2, out=scales)
    shares = blocks / scales.clamp_min(TINY)[..., None]
    rounded = shares.abs().sqrt_().mul_(127).round_().copysign_(shares)
    codes.copy_(rounded.view(num_rows, -1)[:, :num_columns])


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """What `encode` kept, float32 (n, m)."""
    roots = codes.float().div_(127)
    num_rows, num_columns = codes.shape
    signed_squares = F.pad(roots.mul(roots.abs()), (0, -num_columns % BLOCK)).view(num_rows, -1, BLOCK)
    return (signed_squares * scales[..., None]).view(num_rows, -1)[:, :num_columns]
