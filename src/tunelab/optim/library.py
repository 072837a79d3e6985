"""Optimizers of other libraries. Each library is imported when one of its optimizers is built.

Their batched ("foreach") forms are not used: they hold a temporary as large as all weights at once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tunelab.config.optimizers import (
    AdafactorConfig,
    AdamW8bitConfig,
    CAMEConfig,
    LionConfig,
    ScheduleFreeAdamWConfig,
    SM3Config,
)

Groups = list[dict[str, Any]]


def lion(groups: Groups, config: LionConfig) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.Lion(groups, lr=config.learning_rate, betas=config.betas, foreach=False)


def adafactor(groups: Groups, config: AdafactorConfig) -> torch.optim.Optimizer:
    """pytorch-optimizer's, because torch's knows relative steps only, and its ε₁ (1.2e-7 for float32, where the paper
    has 1e-30 and squared gradients of a clipped language model are about 1e-9) would stand in for the second moment.
    """
    import pytorch_optimizer

    return pytorch_optimizer.AdaFactor(
        groups,
        lr=config.learning_rate,
        betas=(None, 1 - 1e-12),  # no momentum; the paper's β₂ has no upper limit but 1
        decay_rate=config.decay_rate,
        clip_threshold=config.clip_threshold,
        scale_parameter=config.scale_parameter,
        relative_step=False,
        eps1=config.eps[0],
        eps2=config.eps[1],
        foreach=False,
    )


def came(groups: Groups, config: CAMEConfig) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.CAME(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        clip_threshold=config.clip_threshold,
        eps1=config.eps[0],
        eps2=config.eps[1],
        foreach=False,
    )


def sm3(groups: Groups, config: SM3Config) -> torch.optim.Optimizer:
    return _sm3_class()(groups, lr=config.learning_rate, momentum=config.momentum, foreach=False)


def adamw_8bit(groups: Groups, config: AdamW8bitConfig) -> torch.optim.Optimizer:
    """bitsandbytes', which has kernels for CPU and CUDA; torchao's compiles its step, which needs a C++ compiler."""
    return _adamw_8bit_class()(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=0.0)


def schedule_free_adamw(groups: Groups, config: ScheduleFreeAdamWConfig) -> torch.optim.Optimizer:
    return _schedule_free_class()(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, foreach=False)


@cache
def _sm3_class() -> Any:
    import pytorch_optimizer

    class SM3(pytorch_optimizer.SM3):
        """With decoupled weight decay (the paper has none), and without a momentum buffer that is not used."""

        def init_group(self, group: dict[str, Any], **kwargs: Any) -> None:
            super().init_group(group, **kwargs)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if group["momentum"] == 0.0:
                        self.state[parameter].pop("momentum_buffer", None)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])

    return SM3


@cache
def _adamw_8bit_class() -> Any:
    import bitsandbytes

    class AdamW8bit(bitsandbytes.optim.AdamW8bit):
        """`optim_bits` of a group says in how many bits its moments are kept.

        The tables of 8-bit codes, the same for every parameter, are lent to a parameter's state for its update only.
        """

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group["optim_bits"]}

        def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            state, tables = self.state[p], {"qmap1": "dynamic", "qmap2": "udynamic"}
            for key, name in tables.items():
                state[key] = self.name2qmap[name] = self.name2qmap[name].to(p.device)
            super().update_step(group, p, gindex, pindex)
            for key in tables:
                del state[key]

    return AdamW8bit


@cache
def _schedule_free_class() -> Any:
    import schedulefree

    class ScheduleFreeAdamW(schedulefree.AdamWScheduleFree):
        """Going to x (`eval`) keeps y aside and coming back (`train`) restores its bits; the authors' code interpolates
        back, so that every evaluation or checkpoint would change the run by rounding. Between the two, `y` (as the
        parameter) is part of the state; gradients are not held then.
        """

        @torch.no_grad()
        def eval(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"] if group["train_mode"] else ():
                    state = self.state.get(parameter, {})
                    if "z" in state:
                        state["y"] = parameter.detach().clone()
                        y = parameter.to(state["z"].dtype)
                        parameter.copy_(y.lerp(state["z"], 1 - 1 / group["betas"][0]))
                group["train_mode"] = False

        @torch.no_grad()
        def train(self) -> None:
            for group in self.param_groups:
                for parameter in () if group["train_mode"] else group["params"]:
                    state = self.state.get(parameter, {})
                    if "y" in state:
                        parameter.copy_(state.pop("y"))
                group["train_mode"] = True

    return ScheduleFreeAdamW


def to_training(optimizer: torch.optim.Optimizer) -> None:
    """Put the weights where gradients are taken, if the optimizer distinguishes (schedule-free: y). Idempotent."""
    if hasattr(optimizer, "train"):
        optimizer.train()


def to_evaluation(optimizer: torch.optim.Optimizer) -> None:
    """Put the weights where the model is evaluated and saved, if the optimizer distinguishes (schedule-free: the
    average x). Idempotent; `to_training` restores the bits.
    """
    if hasattr(optimizer, "eval"):
        optimizer.eval()
