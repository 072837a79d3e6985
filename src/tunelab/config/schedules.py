"""`optimizer.schedule`: how the learning rate moves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunelab.config.section import Count, Fraction, Section


class _Warmup(Section):
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_ratio: Fraction | None = None

    @model_validator(mode="after")
    def _one_warmup(self) -> _Warmup:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self


class ConstantSchedule(_Warmup):
    lr_scheduler_type: Literal["constant"] = "constant"


class LinearSchedule(_Warmup):
    lr_scheduler_type: Literal["linear"] = "linear"
    min_lr_ratio: Fraction = 0.0


class CosineSchedule(_Warmup):
    lr_scheduler_type: Literal["cosine"] = "cosine"
    min_lr_ratio: Fraction = 0.0


class InverseSqrtSchedule(_Warmup):
    lr_scheduler_type: Literal["inverse_sqrt"] = "inverse_sqrt"
    timescale: Count | None = Field(None, description="default: the warmup steps, or 10000 without warmup")


class WSDSchedule(_Warmup):
    """Warmup, stable, decay (Hu et al. 2024, MiniCPM)."""

    lr_scheduler_type: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "linear"
    min_lr_ratio: Fraction = 0.0


ScheduleConfig = Annotated[
    ConstantSchedule | LinearSchedule | CosineSchedule | InverseSqrtSchedule | WSDSchedule,
    Field(discriminator="lr_scheduler_type"),
]
