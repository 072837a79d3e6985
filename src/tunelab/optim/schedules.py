"""Learning-rate schedules: pure functions from a step to a multiplier of the peak learning rate.

Steps count from 0; a run of N steps uses 0 … N-1. With W warm-up steps the multiplier is (s+1)/W for s < W, so
the first step already learns (transformers' s/W spends a step at learning rate 0). A decay starts at 1 in step W
and is at its floor at step N, the end of the run: the last step taken is one decrement above it, so with floor 0
no step is wasted either. From step W on, the values are transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from tunelab.config import ScheduleConfig
from tunelab.config.schedules import (
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    WSDSchedule,
)
from tunelab.errors import ConfigError

Schedule = Callable[[int], float]

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""Progress in [0, 1] → how much of the way down is left. 1-sqrt is from Hägele et al. 2024, "Scaling Laws and
Compute-Optimal Training Beyond Fixed Training Durations"."""

INVERSE_SQRT_TIMESCALE = 10_000
"""Steps of the inverse-sqrt schedule without warm-up (transformers' default)."""


def build_schedule(config: ScheduleConfig, num_steps: int) -> Schedule:
    """The multiplier in [0, 1] of each step of a run of `num_steps`; beyond its end the last value is kept.

    Raises ConfigError if the warm-up (and the decay of warmup_stable_decay) do not fit into the run.
    """
    warmup = _warmup_steps(config, num_steps)
    after = _after_warmup(config, warmup, num_steps)

    def multiplier(step: int) -> float:
        return (step + 1) / warmup if step < warmup else after(min(step, num_steps))

    return multiplier


def _after_warmup(config: ScheduleConfig, warmup: int, num_steps: int) -> Schedule:
    match config:
        case ConstantSchedule():
            return lambda step: 1.0
        case LinearSchedule():
            return _decay("linear", warmup, num_steps, config.min_lr_ratio)
        case CosineSchedule():
            return _decay("cosine", warmup, num_steps, config.min_lr_ratio)
        case InverseSqrtSchedule():
            timescale = config.timescale or warmup or INVERSE_SQRT_TIMESCALE
            return lambda step: math.sqrt(timescale / (timescale + step - warmup))
        case WSDSchedule():
            decay_steps = _share(config.decay_ratio, num_steps)
            if warmup + decay_steps > num_steps:
                raise ConfigError(
                    f"{_warmup_key(config)}: {warmup} warm-up and {decay_steps} decay steps "
                    f"(decay_ratio {config.decay_ratio}) exceed the run's {num_steps}; shorten one of them"
                )
            return _decay(config.decay_type, num_steps - decay_steps, num_steps, config.min_lr_ratio)


def _decay(shape: str, start: int, stop: int, floor: float) -> Schedule:
    """1 up to step `start`, `floor` from step `stop` on."""
    left = DECAY_SHAPES[shape]

    def multiplier(step: int) -> float:
        if step >= stop:
            return floor
        return floor + (1 - floor) * left(max(0.0, (step - start) / (stop - start)))

    return multiplier


def _warmup_steps(config: ScheduleConfig, num_steps: int) -> int:
    if config.warmup_ratio is not None:
        return _share(config.warmup_ratio, num_steps)
    warmup = config.warmup_steps or 0
    if warmup > num_steps:
        raise ConfigError(
            f"{_warmup_key(config)}: {warmup} warm-up steps exceed the run's {num_steps}; use fewer, or warmup_ratio"
        )
    return warmup


def _share(ratio: float, num_steps: int) -> int:
    """`ratio` of the steps, rounded up. Reckoned in decimals: 0.07 of 100 is 7, where floats make it 8."""
    return math.ceil(Fraction(repr(ratio)) * num_steps)


def _warmup_key(config: ScheduleConfig) -> str:
    key = "warmup_ratio" if config.warmup_ratio is not None else "warmup_steps"
    return f"optimizer.schedule.{key}"
