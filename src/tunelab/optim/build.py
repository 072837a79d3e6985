"""From `optimizer` of a recipe to a torch optimizer. A new optimizer is one builder here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
    BAdamConfig,
    CAMEConfig,
    FiraConfig,
    GaLoreConfig,
    LionConfig,
    LISAConfig,
    LOMOConfig,
    MuonConfig,
    OptimizerConfig,
    QuarterConfig,
    RMSpropConfig,
    ScheduleFreeAdamWConfig,
    SGDConfig,
    SM3Config,
)
from tunelab.errors import ConfigError, MachineError
from tunelab.optim import library
from tunelab.optim.adam_mini import AdamMini
from tunelab.optim.composite import Composite
from tunelab.optim.groups import ParameterRoles, parameter_groups
from tunelab.optim.lomo import AdaLomo
from tunelab.optim.low_rank import LowRankAdamW
from tunelab.optim.quarter import Quarter

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps"})
"""Where torch ≥ 2.11 updates a parameter in one kernel (SGD, Adam and AdamW alike); elsewhere torch chooses."""

PACKAGES = {
    LionConfig: ("pytorch_optimizer", "optimizers"),
    AdafactorConfig: ("pytorch_optimizer", "optimizers"),
    SM3Config: ("pytorch_optimizer", "optimizers"),
    CAMEConfig: ("pytorch_optimizer", "optimizers"),
    ScheduleFreeAdamWConfig: ("schedulefree", "optimizers"),
    AdamW8bitConfig: ("bitsandbytes", "quantization"),
}
"""The package an optimizer comes from, and tunelab's extra that brings it."""

FOR_MATRICES = (MuonConfig, GaLoreConfig, FiraConfig, ApolloConfig)
"""Of these only matrices inside blocks are updated by the method itself, the rest by AdamW."""

MUON_WARNING = (
    "warning: muon is made for pre-training; models trained with Adam, as nearly all are, tend to come out worse than "
    "with adamw (Qu et al. 2026, arXiv 2605.10468). A small learning rate or LoRA lessens that"
)


@dataclass(frozen=True)
class Target:
    """Where an optimizer is built for, beside its own settings: the parameters' device and roles, the run's seed."""

    device_type: str
    roles: ParameterRoles
    seed: int

    @property
    def fused(self) -> bool | None:
        return True if self.device_type in FUSED_DEVICES else None


Groups = list[dict[str, Any]]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    device_type: str,
    *,
    roles: ParameterRoles | None = None,
    seed: int = 0,
    learning_rate_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over groups by `parameter_groups`; its state is flat and restores exactly.

    The learning rate is the peak; whoever runs the loop sets each group's `lr` to peak × schedule × the group's
    `lr_scale`, if it has one, before a step. `device_type` is that of the parameters; `roles` by the same names;
    `seed` is of random projections. `weight_decay` of sgd, rmsprop, adagrad and adam is L2: it enters the gradient,
    and so the momentum; elsewhere it is decoupled.

    Raises MachineError if a package is missing.
    """
    check_packages(config)
    target = Target(device_type, roles or ParameterRoles(), seed)

    def kind(name: str, parameter: nn.Parameter) -> str:
        if isinstance(config, FOR_MATRICES):
            return "matrix" if target.roles.is_block_matrix(name, tuple(parameter.shape)) else "rest"
        if isinstance(config, AdamW8bitConfig):
            return "32bit" if config.embeddings_32bit and target.roles.is_embedding(name) else "8bit"
        return ""

    groups = parameter_groups(
        named_parameters, config.weight_decay, learning_rate_scales=learning_rate_scales, kind=kind
    )
    return BUILDERS[type(config)](groups, config, target)


def check_optimizer(config: OptimizerConfig, adapted: nn.Module | None) -> None:
    """What can be refused before weights are read; `adapted` is the model's skeleton with its adapter, if it has one.

    Raises MachineError if a package is missing, ConfigError if a method for matrices has none to work on.
    """
    check_packages(config)
    if adapted is None or not isinstance(config, FOR_MATRICES):
        return
    roles = ParameterRoles.of(adapted)
    trained = [(name, tuple(p.shape)) for name, p in adapted.named_parameters() if p.requires_grad]
    if not any(roles.is_block_matrix(name, shape) for name, shape in trained):
        raise ConfigError(
            f"optimizer.name: {config.name} is for matrices inside blocks, and this adapter trains none; use adamw"
        )


def optimizer_note(config: OptimizerConfig) -> str | None:
    """What a person should know before a run with this optimizer, as one line."""
    return MUON_WARNING if isinstance(config, MuonConfig) else None


def check_packages(config: OptimizerConfig) -> None:
    """Raise MachineError if the optimizer's package is missing, without importing any."""
    package, extra = PACKAGES.get(type(config), ("torch", ""))
    if importlib.util.find_spec(package) is None:
        raise MachineError(
            f"optimizer.name: {config.name} needs the package {package}, which is not installed; "
            f"pip install 'tunelab[{extra}]'"
        )


def _torch_adam(groups: Groups, config: AdamConfig, target: Target) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if isinstance(config, AdamWConfig) else torch.optim.Adam
    return kind(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=target.fused)


def _sgd(groups: Groups, config: SGDConfig, target: Target) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov, fused=target.fused
    )


def _rmsprop(groups: Groups, config: RMSpropConfig, target: Target) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(
        groups,
        lr=config.learning_rate,
        alpha=config.alpha,
        eps=config.eps,
        momentum=config.momentum,
        centered=config.centered,
        foreach=False,
    )


def _adagrad(groups: Groups, config: AdagradConfig, target: Target) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(
        groups,
        lr=config.learning_rate,
        eps=config.eps,
        initial_accumulator_value=config.initial_accumulator_value,
        foreach=False,
    )


def _adam_mini(groups: Groups, config: AdamMiniConfig, target: Target) -> torch.optim.Optimizer:
    return AdamMini(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, roles=target.roles)


def _muon(groups: Groups, config: MuonConfig, target: Target) -> torch.optim.Optimizer:
    def on_matrices(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Muon(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_steps=config.ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )

    return _with_adamw(on_matrices, groups, config, target)


def _low_rank(
    groups: Groups, config: GaLoreConfig | FiraConfig | ApolloConfig, target: Target
) -> torch.optim.Optimizer:
    def on_matrices(groups: Groups) -> torch.optim.Optimizer:
        return LowRankAdamW(
            groups,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            method=config.name,
            rank=config.rank,
            update_proj_gap=config.update_proj_gap,
            scale=config.scale,
            seed=target.seed,
        )

    return _with_adamw(on_matrices, groups, config, target)


def _with_adamw(
    on_matrices: Callable[[Groups], torch.optim.Optimizer],
    groups: Groups,
    config: MuonConfig | GaLoreConfig | FiraConfig | ApolloConfig,
    target: Target,
) -> torch.optim.Optimizer:
    """`on_matrices` for the groups of that kind, AdamW for the others; either may have none."""
    matrices = [group for group in groups if group["kind"] == "matrix"]
    rest = [group for group in groups if group["kind"] == "rest"]
    parts: dict[str, torch.optim.Optimizer] = {}
    if matrices:
        parts["matrix"] = on_matrices(matrices)
    if rest:
        lr, betas, eps = config.learning_rate, config.betas, config.eps
        parts["rest"] = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=target.fused)
    return Composite(parts)


def _adamw_8bit(groups: Groups, config: AdamW8bitConfig, target: Target) -> torch.optim.Optimizer:
    for group in groups:
        group["optim_bits"] = 32 if group["kind"] == "32bit" else 8
    return library.adamw_8bit(groups, config)


def _lomo(groups: Groups, config: LOMOConfig, target: Target) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.learning_rate, fused=target.fused)


def _adalomo(groups: Groups, config: AdaLomoConfig, target: Target) -> torch.optim.Optimizer:
    return AdaLomo(
        groups,
        lr=config.learning_rate,
        decay_rate=config.decay_rate,
        eps=config.eps,
        clip_threshold=config.clip_threshold,
    )


def _quarter(groups: Groups, config: QuarterConfig, target: Target) -> torch.optim.Optimizer:
    return Quarter(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        clip_threshold=config.clip_threshold,
        seed=target.seed,
    )


BUILDERS: dict[type, Callable[[Groups, Any, Target], torch.optim.Optimizer]] = {
    SGDConfig: _sgd,
    RMSpropConfig: _rmsprop,
    AdagradConfig: _adagrad,
    AdamConfig: _torch_adam,
    AdamWConfig: _torch_adam,
    AdamW8bitConfig: _adamw_8bit,
    LionConfig: lambda groups, config, target: library.lion(groups, config),
    AdafactorConfig: lambda groups, config, target: library.adafactor(groups, config),
    SM3Config: lambda groups, config, target: library.sm3(groups, config),
    CAMEConfig: lambda groups, config, target: library.came(groups, config),
    AdamMiniConfig: _adam_mini,
    MuonConfig: _muon,
    GaLoreConfig: _low_rank,
    FiraConfig: _low_rank,
    ApolloConfig: _low_rank,
    ApolloMiniConfig: _low_rank,
    ScheduleFreeAdamWConfig: lambda groups, config, target: library.schedule_free_adamw(groups, config),
    QuarterConfig: _quarter,
    LISAConfig: _torch_adam,
    BAdamConfig: _torch_adam,
    LOMOConfig: _lomo,
    AdaLomoConfig: _adalomo,
}
