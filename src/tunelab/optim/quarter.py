"""Quarter: AdamW in a quarter of its memory, at most 4 bytes a parameter with weights and gradients.

For a matrix W (n, m) with gradient G at step t, all arithmetic in float32:

    V ← β₂ V + (1 − β₂) G²                                              Adam, algorithm 1
    G ← G / max(1, RMS(G / √V̂) / d),     V̂ = V / (1 − β₂ᵗ)              Adafactor, §6: in place of global clipping
    M ← β₁ M + (1 − β₁) G,               M̂ = M / (1 − β₁ᵗ)              Adam
    W ← W − η (M̂ / (√V̂ + ε) + λ W)                                      AdamW, algorithm 2

and then M and V are kept in 4 bits a value (`nibbles.py`), and W, if bf16, in bf16, all three rounded stochastically:
what is stored is on average what AdamW would have. Nothing else differs from AdamW. Vectors (biases, norms: 0.1% of a
model) are AdamW with float32 moments.

Adam: Kingma & Ba 2015; AdamW: Loshchilov & Hutter 2019; Adafactor: Shazeer & Stern 2018. Moments in 4 bits: Li et al.
2023, who round to nearest and therefore factor V.

Bytes a parameter: 2 of W, 1.06 of M and V. With `training.gradient_release` gradients live one tensor at a time: their
peak is the tied embedding's 2 bytes (31% of GPT-2: 0.62) and half a block's. Nothing here depends on a second
parameter, no global norm and no shared statistic: that is what release asks for. A matrix is updated some rows at a
time, so that float32 exists for `CHUNK` values and not for an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tunelab.optim.nibbles import (
    decode_momentum,
    decode_square,
    encode_momentum,
    encode_square,
    nibbles_shape,
    scales_shape,
)
from tunelab.optim.rounding import generator_for, stochastic_round

CHUNK = 1 << 18
"""Values of a matrix in float32 at once, in whole rows. The random bits are drawn in its order."""


class Quarter(torch.optim.Optimizer):
    """The update above, of float32 and bf16 parameters. Takes everything as torch's AdamW, and:

    clip_threshold: the largest root mean square of a matrix's G / √V̂ (d). seed: all random bits are a function of
    (seed, step, number of the parameter), so a resumed run goes on with the same.

    State of a matrix: `step` (int), `exp_avg` and `exp_avg_sq` uint8 (n, ⌈m/2⌉), `exp_avg_scale` and
    `exp_avg_sq_scale` float32 (n, ⌈m/128⌉); of a vector: `step`, `exp_avg`, `exp_avg_sq` float32. Raises TypeError for
    parameters of any other dtype.
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
    matrix = shape[0], math.prod(shape[1:])
    return 2 * (math.prod(nibbles_shape(*matrix)) + 4 * math.prod(scales_shape(*matrix)))


def _update_vector(
    parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], generator: torch.Generator
) -> None:
    """AdamW, algorithm 2. gradient: (n,) or ()."""
    gradient = gradient.float()
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    beta1, beta2 = group["betas"]
    mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
    square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
    _move(parameter.data, mean / (1 - beta1 ** state["step"]), _root(square, state["step"], group), group, generator)


def _update_matrix(
    parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], generator: torch.Generator
) -> None:
    """The module's equations. gradient: (n, m), or (n, …) with all but the first dimension taken as one."""
    gradient, weight = gradient.flatten(1), parameter.data.flatten(1)
    if "exp_avg" not in state:
        _start_matrix(state, gradient)
    columns, beta1 = gradient.shape[1], group["betas"][0]
    clipping = _clipping(gradient, state, group)
    for rows in _chunks(gradient):
        square = _next_square(gradient[rows], state, rows, group)
        momentum = decode_momentum(state["exp_avg"][rows], state["exp_avg_scale"][rows], columns)
        momentum.lerp_(_float32(gradient[rows]).div_(clipping), 1 - beta1)
        encode_momentum(momentum, state["exp_avg"][rows], state["exp_avg_scale"][rows], generator)
        encode_square(square, state["exp_avg_sq"][rows], state["exp_avg_sq_scale"][rows], generator)
        root = _root(square, state["step"], group)
        _move(weight[rows], momentum.div_(1 - beta1 ** state["step"]), root, group, generator)


def _start_matrix(state: dict[str, Any], gradient: Tensor) -> None:
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = gradient.new_zeros(nibbles_shape(*gradient.shape), dtype=torch.uint8)
        state[f"{name}_scale"] = gradient.new_zeros(scales_shape(*gradient.shape), dtype=torch.float32)


def _clipping(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """By what G is divided, (). V is brought up to date here only to be looked at, so no matrix of it is kept."""
    total = gradient.new_zeros((), dtype=torch.float32)
    for rows in _chunks(gradient):
        root = _root(_next_square(gradient[rows], state, rows, group), state["step"], group)
        total += torch.div(gradient[rows].float(), root, out=root).square_().sum()
    return (total / gradient.numel()).sqrt_().div_(group["clip_threshold"]).clamp_min_(1.0)


def _next_square(gradient: Tensor, state: dict[str, Any], rows: slice, group: dict[str, Any]) -> Tensor:
    """V of these rows with `gradient` taken in, float32."""
    square = decode_square(state["exp_avg_sq"][rows], state["exp_avg_sq_scale"][rows], gradient.shape[1])
    return square.lerp_(_float32(gradient).square_(), 1 - group["betas"][1])


def _root(square: Tensor, step: int, group: dict[str, Any]) -> Tensor:
    """√V̂ + ε."""
    return (square / (1 - group["betas"][1] ** step)).sqrt_().add_(group["eps"])


def _move(weight: Tensor, mean: Tensor, root: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
    """weight ← weight − η (mean / root + λ weight), in place; bf16 rounded stochastically."""
    moved = _float32(weight).mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(mean, root, value=-group["lr"])
    weight.copy_(stochastic_round(moved, generator) if weight.dtype == torch.bfloat16 else moved)


def _float32(tensor: Tensor) -> Tensor:
    """A copy, also where it is float32 already."""
    return tensor.to(torch.float32, copy=True)


def _chunks(matrix: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // max(1, matrix.shape[1]))
    return (slice(start, start + rows) for start in range(0, matrix.shape[0], rows))
