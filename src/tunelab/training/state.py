"""The one object a run is while it runs, and exactly what a checkpoint holds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tunelab.models.loaded import LoadedModel
from tunelab.optim.updates import Updates


@dataclass
class Counters:
    """Where the run stands, in numbers that JSON holds exactly.

    `step` optimizer steps are done. `samples`, `tokens` (packed, prompts once) and `loss_tokens` were trained on;
    `flops` by the model's formula, `floor_flops` by what a step cannot do without, `flops_6nd` by 6·N·tokens.
    `seconds` by phase, over all sessions of the run.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    flops: float = 0.0
    floor_flops: float = 0.0
    flops_6nd: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0

    def add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


@dataclass
class EvaluationState:
    """What later evaluations are compared with. `last_step` is the step last evaluated, −1 before the first."""

    last_step: int = -1
    best_loss: float | None = None
    best_step: int | None = None
    without_improvement: int = 0

    def note(self, step: int, loss: float, threshold: float) -> None:
        """An evaluation after `step` gave `loss`: less than the best by more than `threshold` is an improvement."""
        if not math.isfinite(loss):  # no checkpoint of such a model is worth keeping
            self.without_improvement += 1
            return
        improved = self.best_loss is None or loss < self.best_loss - threshold
        self.without_improvement = 0 if improved else self.without_improvement + 1
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step = loss, step


@dataclass
class Portions:
    """What the memory turned out to have room for, once it was too small; None: as much as the recipe asks for."""

    tokens_per_micro_batch: int | None = None
    records_per_evaluation_batch: int | None = None


@dataclass
class TrainState:
    """Model, optimizer, scaler, counters. The loader's position is `counters.step` (its order is a pure function);
    random generators are read and written by the checkpoint itself.
    """

    loaded: LoadedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    counters: Counters = field(default_factory=Counters)
    evaluation: EvaluationState = field(default_factory=EvaluationState)
    portions: Portions = field(default_factory=Portions)
    stop_early: bool = False
    updates: Updates = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.updates is None:
            self.updates = Updates(self.optimizer)

    @property
    def step(self) -> int:
        return self.counters.step

    def numbers(self) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return {
            "counters": asdict(self.counters),
            "evaluation": asdict(self.evaluation),
            "portions": asdict(self.portions),
            "stop_early": self.stop_early,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        self.counters = Counters(**numbers["counters"])
        self.evaluation = EvaluationState(**numbers["evaluation"])
        self.portions = Portions(**numbers.get("portions", {}))  # older checkpoints have none
        self.stop_early = numbers["stop_early"]
        if self.scaler is not None and numbers["scaler"] is not None:
            self.scaler.load_state_dict(numbers["scaler"])
