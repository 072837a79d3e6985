"""Adam-mini: Adam with one second moment per block of weights (Zhang et al. 2024, algorithms 1 and 3).

Written here because the packaged versions (the authors' and pytorch-optimizer's) know blocks by substrings of Llama's
module names, assume heads of hidden size / number of heads, and give every other matrix one block or, embeddings, a
second moment per weight: GPT-2's fused, input-first `c_attn` would be one block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tunelab.optim.groups import ParameterRoles


class AdamMini(torch.optim.Optimizer):
    """Decoupled weight decay. State by parameter, in float32 at least: `exp_avg`, as the parameter; `exp_avg_sq`,
    (blocks,), the running mean over each block of squared gradients.

    A block is a token's row of an embedding or the output head, a head's part of queries or keys, the weights of one
    output neuron of any other matrix, and the whole of a vector.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        roles: ParameterRoles,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.roles = roles

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._update(name, parameter, group)

    def _update(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        blocks = Blocks(parameter.shape, name in self.roles.input_first, *self.roles.heads.get(name, (0, 1)))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        gradient = parameter.grad.to(dtype)  # type: ignore[union-attr]
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = gradient.new_zeros(blocks.count)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].lerp_(blocks.mean_square(gradient), 1 - beta2)

        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        step_size = group["lr"] / (1 - beta1 ** state["step"])
        weights = parameter.to(dtype)  # the parameter itself, unless it is narrower
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.addcmul_(state["exp_avg"], blocks.spread(root.reciprocal_()), value=-step_size)
        if weights is not parameter:
            parameter.copy_(weights)


class Blocks:
    """How a tensor is cut: its first `head_outputs` outputs by `head_size`, the others one by one; a vector not."""

    def __init__(self, shape: tuple[int, ...], input_first: bool, head_outputs: int, head_size: int) -> None:
        self.shape, self.input_first = tuple(shape), input_first
        self.head_outputs, self.head_size = head_outputs, head_size
        self.outputs = 1 if len(shape) < 2 else shape[-1] if input_first else math.prod(shape[:-1])
        self.count = head_outputs // head_size + self.outputs - head_outputs

    def mean_square(self, gradient: Tensor) -> Tensor:
        """(blocks,), heads first."""
        matrix = gradient.t() if self.input_first else gradient.reshape(self.outputs, -1)
        means = torch.linalg.vector_norm(matrix, dim=1).square_().div_(matrix.shape[1])
        heads, neurons = means.split([self.head_outputs, self.outputs - self.head_outputs])
        return torch.cat([heads.view(-1, self.head_size).mean(1), neurons])

    def spread(self, values: Tensor) -> Tensor:
        """(blocks,) → a shape that broadcasts over the tensor."""
        heads, neurons = values.split([self.head_outputs // self.head_size, self.outputs - self.head_outputs])
        rows = torch.cat([heads.repeat_interleave(self.head_size), neurons])
        if self.input_first:
            return rows
        return rows.view(*self.shape[:-1], 1) if len(self.shape) > 1 else rows
