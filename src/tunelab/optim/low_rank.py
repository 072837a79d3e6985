"""GaLore, Fira and APOLLO: Adam's moments of a projected gradient.

Written here because the packaged versions keep a projector object, which no checkpoint without pickle holds, and draw
random projections from the global generator, so that a resumed run is another run. pytorch-optimizer 4.1's APOLLO,
moreover, projects the scaled gradient back instead of scaling the full one (Zhu et al. 2024, algorithm 1, step 4), and
apollo-torch is not licensed for commercial use.

For a matrix (m, n) the longer side stays and the shorter is projected to k = min(rank, m, n): R = G·Pᵀ with P (k, n) if
m ≥ n, else R = P·G with P (k, m). The moments are of R; Ñ = M̂ / (√V̂ + ε) is Adam's update of it.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, Literal

import torch
from torch import Tensor

from tunelab.optim.rounding import generator_for

GROWTH = 1.01
"""γ of the norm-growth limiter (Chen et al. 2024, eq. 8): a matrix's update grows by at most this factor a step."""

Method = Literal["galore", "fira", "apollo", "apollo_mini"]


class LowRankAdamW(torch.optim.Optimizer):
    """For matrices only; decoupled weight decay. With α = `scale`, P's rows orthonormal for the first two:

    - galore: α·PᵀÑ. P: the leading singular vectors of every `update_proj_gap`-th gradient (Zhao et al. 2024, alg. 2).
    - fira: α·PᵀÑ + limited(φ·(G − α·PᵀR)), φ = ‖Ñ‖/‖R‖ along the projected side (Chen et al. 2024, algorithm 1; α
      in the second term as in the authors' code).
    - apollo: limited(φ·G)·√α, P Gaussian with variance 1/k; apollo_mini: the same with one φ for the matrix.

    State by parameter, in float32 at least: `exp_avg`, `exp_avg_sq` like R; `projection` (k, shorter side) of galore
    and fira; `norm`, a scalar, of the last limited term, not of galore. APOLLO's P is a function of `seed`, the
    parameter's name and the step alone, and is drawn anew each time.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        method: Method,
        rank: int,
        update_proj_gap: int,
        scale: float,
        seed: int,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.method, self.rank, self.update_proj_gap, self.scale, self.seed = method, rank, update_proj_gap, scale, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._update(name, parameter, group)

    def _update(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        tall = parameter.shape[0] >= parameter.shape[1]
        gradient = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))  # type: ignore[union-attr]
        gradient = gradient if tall else gradient.t()  # (longer, shorter)
        state = self.state[parameter]
        projection = self._projection(name, gradient, state)
        low = gradient @ projection.t()
        if "exp_avg" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(low), "exp_avg_sq": torch.zeros_like(low)}
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(low, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2)
        normed = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])

        update = self._back(gradient, projection, low, normed, state)
        corrections = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update if tall else update.t(), alpha=-group["lr"] * corrections)

    def _projection(self, name: str, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """P (k, shorter side) for this step."""
        done, rank = state.get("step", 0), min(self.rank, gradient.shape[1])
        if self.method in ("apollo", "apollo_mini"):
            key = (self.seed, zlib.crc32(name.encode()), done // self.update_proj_gap)
            return gaussian_projection(rank, gradient, key)
        if done % self.update_proj_gap == 0:
            directions = torch.linalg.svd(gradient, full_matrices=False).Vh[:rank]
            # LAPACK's order in memory is another than a checkpoint's, and products round by it.
            state["projection"] = directions.clone(memory_format=torch.contiguous_format)
        return state["projection"]

    def _back(self, gradient: Tensor, projection: Tensor, low: Tensor, normed: Tensor, state: dict[str, Any]) -> Tensor:
        """The update (longer, shorter), before the learning rate and Adam's bias corrections."""
        if self.method == "galore":
            return (normed @ projection).mul_(self.scale)
        side = (0, 1) if self.method == "apollo_mini" else 1
        factor = torch.linalg.vector_norm(normed, dim=side, keepdim=True)
        factor /= torch.linalg.vector_norm(low, dim=side, keepdim=True) + 1e-8
        if self.method == "fira":
            rest = gradient - (low @ projection).mul_(self.scale)
            return (normed @ projection).mul_(self.scale).add_(limited(rest.mul_(factor), state))
        return limited(gradient * factor, state).mul_(math.sqrt(self.scale))


def gaussian_projection(rank: int, like: Tensor, key: tuple[int, ...]) -> Tensor:
    """(rank, columns of `like`) with variance 1/rank: lengths are kept in expectation."""
    generator = generator_for(like.device, *key)
    shape = (rank, like.shape[1])
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device).div_(math.sqrt(rank))


def limited(update: Tensor, state: dict[str, Any]) -> Tensor:
    """`update`, in place, shortened to `GROWTH` times the length of the last; the first that is not 0 sets the start.

    (In the authors' code a first update of 0, as of LoRA's A, would hold the matrix still for ever.)
    """
    norm = torch.linalg.vector_norm(update)
    if "norm" in state:
        last = state["norm"]
        excess = (norm / (last + 1e-8) / GROWTH).clamp_(min=1.0)
        excess = torch.where(last > 0, excess, torch.ones_like(excess))
        update.div_(excess)
        norm = norm / excess
    state["norm"] = norm
    return update
