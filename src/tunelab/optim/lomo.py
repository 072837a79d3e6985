"""AdaLomo's update. LOMO's own is plain SGD in the backward pass (`release.py`), so it needs nothing here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdaLomo(torch.optim.Optimizer):
    """Lv et al. 2023, "AdaLomo: Low-memory Optimization with Adaptive Learning Rate", algorithm 1.

    With the gradient g of a matrix W (m, n) at step t, β = 1 − t^decay_rate:

        r ← β r + (1 − β) mean_j(g² + ε₁),   c ← β c + (1 − β) mean_i(g² + ε₁)      (m,), (n,)
        u = g / √(r cᵀ / mean(r)),           û = u / max(1, RMS(u)/clip_threshold)
        W ← W − η max(ε₂, RMS(W)) (û + λ W)

    Vectors keep their second moment whole. State and arithmetic are float32 whatever the weights are. As in the
    authors' code (lomo-optim 0.1.1), where ε₁ and the threshold are settings.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        decay_rate: float = -0.8,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "decay_rate": decay_rate,
            "eps": eps,
            "clip_threshold": clip_threshold,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("AdaLomo takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, parameter.grad.float(), self.state[parameter], group)


def _update(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    state["step"] = step = state.get("step", 0) + 1
    share = step ** group["decay_rate"]  # 1 − β
    squared = gradient.square().add_(group["eps"][0])
    if gradient.ndim >= 2:
        rows = _mean_into(state, "row", squared.mean(-1), share)
        columns = _mean_into(state, "column", squared.mean(-2), share)
        scale = (rows / rows.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        update = torch.mul(gradient, scale, out=squared).mul_(columns.rsqrt().unsqueeze(-2))
    else:
        update = _mean_into(state, "square", squared, share).rsqrt().mul_(gradient)
    update.div_((_root_mean_square(update) / group["clip_threshold"]).clamp_(min=1.0))
    weight = parameter.float()
    rate = _root_mean_square(weight).clamp_(min=group["eps"][1]) * group["lr"]
    parameter.copy_(weight * (1.0 - rate * group["weight_decay"]) - update.mul_(rate))


def _mean_into(state: dict[str, Any], name: str, value: Tensor, share: float) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(value)
    mean: Tensor = state[name].lerp_(value, share)
    return mean


def _root_mean_square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor) / math.sqrt(tensor.numel())
