"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in at most two groups: matrices, which decay, and vectors, which do not.

    Anything with two or more dimensions decays, embeddings included (as in GPT-3, nanoGPT and transformers'
    Trainer); biases, norm gains and other vectors never do: shrinking a gain towards 0 is no regularisation.
    The rule goes by shape, not by name, so it holds for every architecture. Frozen parameters are left out, and a
    tensor that appears under two names (tied embeddings) is taken once, or it would be updated twice a step.
    """
    trainable = {id(parameter): parameter for _, parameter in named_parameters if parameter.requires_grad}
    decayed = [parameter for parameter in trainable.values() if parameter.ndim >= 2]
    exempt = [parameter for parameter in trainable.values() if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
