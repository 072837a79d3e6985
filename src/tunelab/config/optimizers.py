"""`optimizer`: one frozen model per choice."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunelab.config.schedules import LinearSchedule, ScheduleConfig
from tunelab.config.section import NonNegative, Positive, Section

SFT_LEARNING_RATE, DPO_LEARNING_RATE = 2e-5, 5e-6
"""Defaults of adam and adamw by method, for training every weight."""


class _Optimizer(Section):
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    schedule: ScheduleConfig = LinearSchedule()


class SGDConfig(_Optimizer):
    """Plain SGD; `momentum` > 0 is heavy-ball momentum, `nesterov` its look-ahead form."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Positive = 1e-2
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov needs momentum > 0")
        return self


class AdamConfig(_Optimizer):
    """Adam with L2 regularisation in the gradient (Kingma & Ba 2015)."""

    name: Literal["adam"] = "adam"
    learning_rate: Positive = SFT_LEARNING_RATE
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), strict=False
    )
    eps: Positive = 1e-8


class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"  # type: ignore[assignment]


OptimizerConfig = Annotated[SGDConfig | AdamConfig | AdamWConfig, Field(discriminator="name")]
