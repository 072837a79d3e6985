"""From `optimizer` of a recipe to torch optimizers. A new optimizer is one line here."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tunelab.config import AdamConfig, AdamWConfig, SGDConfig
from tunelab.optim.groups import parameter_groups

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps"})
"""Where torch ≥ 2.11 updates a parameter in one kernel (SGD, Adam and AdamW alike); elsewhere torch chooses."""


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: SGDConfig | AdamConfig, device_type: str
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, with weight decay by `parameter_groups`.

    The learning rate is the peak; whoever runs the loop sets each group's `lr` to peak × schedule before a step.
    `device_type` is that of the parameters. `weight_decay` of sgd and adam is L2: it enters the gradient, and so
    the momentum; of adamw it is decoupled.
    """
    groups = parameter_groups(named_parameters, config.weight_decay)
    lr = config.learning_rate
    fused = True if device_type in FUSED_DEVICES else None
    match config:
        case AdamWConfig():
            return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)
        case AdamConfig():
            return torch.optim.Adam(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)
        case SGDConfig():
            return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
