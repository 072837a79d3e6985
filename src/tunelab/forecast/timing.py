"""From speeds and counts to a run's seconds, phase by phase."""

from __future__ import annotations

from typing import Any

from tunelab.forecast.calibration import Speeds
from tunelab.forecast.counts import Counts
from tunelab.session import EVALUATIONS_PER_RUN, Plan

LOAD_SECONDS, LOAD_BYTE = 1.5, 1e-9
"""Of loading: building the model and trying its layouts, and reading a byte of weights (a page cache's speed)."""

LEAST_UNCERTAINTY = 0.1


def time_forecast(
    plan: Plan, counts: Counts, speeds: Speeds, weight_bytes: int, checkpoint_bytes: int
) -> dict[str, Any]:
    """`seconds` in all and by phase of run.json's `cost.seconds`, seconds per token trained on, and the uncertainty."""
    steps, config = plan.loader.num_steps, plan.recipe.evaluation
    training = counts.training.tokens * speeds.step_token + steps * speeds.update
    every = config.eval_steps or max(1, -(-steps // EVALUATIONS_PER_RUN))
    evaluations = len({*range(0, steps + 1, every), steps})
    saves = len({*range(plan.recipe.training.save_steps, steps + 1, plan.recipe.training.save_steps), steps})
    phases = {
        "loading": LOAD_SECONDS + weight_bytes * LOAD_BYTE,
        "reference": 0.0 if counts.reference is None else counts.reference.tokens * speeds.score_token,
        "training": training,
        "evaluation": evaluations * (counts.evaluation.tokens * speeds.score_token + _answers(plan, counts, speeds)),
        "checkpoint": saves * checkpoint_bytes * speeds.save_byte,
    }
    return {
        "seconds": sum(phases.values()),
        "phases": phases,
        "seconds_per_token": training / counts.training.tokens,
        "uncertainty": max(LEAST_UNCERTAINTY, speeds.spread),
        "reason": "from a calibration of this machine",
    }


def _answers(plan: Plan, counts: Counts, speeds: Speeds) -> float:
    """Prompts at the speed of scoring; then a token a row and pass, each pass taken for that of as many tokens as make
    products wait for the weights rather than for the arithmetic.
    """
    generation = counts.workload.generation
    if generation is None:
        return 0.0
    passes = plan.recipe.evaluation.max_new_tokens
    return speeds.score_token * (generation.prompt_tokens + passes * max(generation.rows, WEIGHT_BOUND_ROWS))


WEIGHT_BOUND_ROWS = 16
"""Rows that a pass over the weights takes as long as one row."""


def unknown_time(reason: str) -> dict[str, Any]:
    return {"seconds": None, "phases": {}, "seconds_per_token": None, "uncertainty": None, "reason": reason}
