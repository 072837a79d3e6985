"""Every optimizer, as the property suite has it: one case per choice of a recipe, and the small model they move."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from tests.models.small_models import small_gpt2, small_llama
from tunelab.config.optimizers import (
    AdafactorConfig,
    AdagradConfig,
    AdaLomoConfig,
    AdamConfig,
    AdamMiniConfig,
    AdamW8bitConfig,
    AdamWConfig,
    ApolloConfig,
    ApolloMiniConfig,
    CAMEConfig,
    FiraConfig,
    GaLoreConfig,
    LionConfig,
    LOMOConfig,
    MuonConfig,
    OptimizerConfig,
    QuarterConfig,
    RMSpropConfig,
    ScheduleFreeAdamWConfig,
    SGDConfig,
    SM3Config,
)
from tunelab.optim import ParameterRoles, build_optimizer, to_training

LOW_RANK = {"rank": 4, "update_proj_gap": 3, "weight_decay": 0.1}

CASES: dict[str, OptimizerConfig] = {
    "sgd": SGDConfig(learning_rate=0.5, weight_decay=0.1),
    "momentum": SGDConfig(learning_rate=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": SGDConfig(learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": RMSpropConfig(learning_rate=1e-3, momentum=0.5, centered=True, weight_decay=0.1),
    "adagrad": AdagradConfig(learning_rate=1e-2, weight_decay=0.1),
    "adam": AdamConfig(learning_rate=3e-3, weight_decay=0.1),
    "adamw": AdamWConfig(learning_rate=1e-3, weight_decay=0.1),
    "adamw_8bit": AdamW8bitConfig(learning_rate=1e-3, weight_decay=0.1),
    "adamw_8bit, embeddings too": AdamW8bitConfig(learning_rate=1e-3, embeddings_32bit=False),
    "lion": LionConfig(learning_rate=1e-3, weight_decay=0.1),
    "adafactor": AdafactorConfig(learning_rate=1e-3, weight_decay=0.1),
    "adafactor, relative": AdafactorConfig(learning_rate=1e-2, weight_decay=0.1, scale_parameter=True),
    "sm3": SM3Config(learning_rate=1e-2, weight_decay=0.1),
    "sm3 without momentum": SM3Config(learning_rate=1e-2, momentum=0.0),
    "came": CAMEConfig(learning_rate=1e-4, weight_decay=0.1),
    "adam_mini": AdamMiniConfig(learning_rate=1e-3, weight_decay=0.1),
    "muon": MuonConfig(learning_rate=1e-2, weight_decay=0.1),
    "galore": GaLoreConfig(learning_rate=1e-2, **LOW_RANK),
    "fira": FiraConfig(learning_rate=1e-2, **LOW_RANK),
    "apollo": ApolloConfig(learning_rate=1e-3, **LOW_RANK),
    "apollo_mini": ApolloMiniConfig(learning_rate=1e-3, weight_decay=0.1),
    "schedule_free_adamw": ScheduleFreeAdamWConfig(learning_rate=1e-3, weight_decay=0.1),
    "lomo": LOMOConfig(learning_rate=0.5, weight_decay=0.1),
    "adalomo": AdaLomoConfig(learning_rate=1e-2, weight_decay=0.1),
    "quarter": QuarterConfig(learning_rate=1e-3, weight_decay=0.1),
}

MODELS = {"gpt2": small_gpt2, "llama": small_llama}


def build(model: nn.Module, config: OptimizerConfig, seed: int = 0) -> torch.optim.Optimizer:
    roles = ParameterRoles.of(model)
    optimizer = build_optimizer(model.named_parameters(), config, "cpu", roles=roles, seed=seed)
    to_training(optimizer)
    return optimizer


def give_gradients(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    """Noise of unequal size, a function of step and name; rows of the first matrix are 0, as of tokens not seen."""
    for number, parameter in enumerate(parameters.values()):
        generator = np.random.default_rng([step, number])
        values = generator.standard_normal(parameter.shape) * 10.0 ** generator.integers(-3, 1)
        if number == 0:
            values[::3] = 0.0
        parameter.grad = torch.tensor(values, dtype=parameter.dtype)
