"""From a recipe to its forecast on a machine that may not be here, and what would fit there."""

from __future__ import annotations

from typing import Any

import torch

from tunelab.config import Recipe
from tunelab.errors import ConfigError, MachineError
from tunelab.forecast import Target, detect_target, run_forecast
from tunelab.forecast.calibration import measure_speeds, read_speeds
from tunelab.models.loading import load_skeleton, load_tokenizer
from tunelab.planner.advice import advise
from tunelab.planner.assumed import assumed_data
from tunelab.preflight import load_data, plan_for, plan_run
from tunelab.progress import Progress
from tunelab.session import Plan, TrainingData


def plan_recipe(
    recipe: Recipe,
    progress: Progress,
    *,
    device: str | None = None,
    memory_bytes: int | None = None,
    records: int | None = None,
    strict: bool = False,
    calibrate: bool = False,
) -> dict[str, Any]:
    """The forecast of `recipe` with whether it fits, and the changes that would: plain JSON-able data.

    device: instead of the recipe's; a CUDA card need not be here, and is what is meant where `memory_bytes` are given
    and neither names a device. records: plan for so many records of `data.max_length` tokens and read no data; so is
    done too where there is no tokenizer or the hub is out of reach. strict: everything that a run needs must be here,
    weights included, as before training (`--dry-run`). calibrate: time this machine at the recipe's own work, where
    that was not done in the last days.

    Keys: those of `run_forecast`, and `assumption`, `target`, `fits`, `advice`, `method`, `data`, `fingerprint`.
    """
    device = device or ("cuda" if memory_bytes is not None and recipe.model.device == "auto" else recipe.model.device)
    planned = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": device})})
    if strict:
        plan, assumption = plan_run(planned, progress), ""
    else:
        plan, assumption = _plan(planned, records, progress)
    target = detect_target(device, memory_bytes)
    if calibrate and target.here and read_speeds(plan) is None:
        measure_speeds(plan, progress)
    forecast = run_forecast(plan, target)
    return (
        forecast
        | {
            "method": recipe.method.name,
            "assumption": assumption,
            "data": plan.data.record(),
            "fingerprint": recipe.fingerprint(),
        }
        | _fit(plan, forecast, target)
    )


def _plan(recipe: Recipe, records: int | None, progress: Progress) -> tuple[Plan, str]:
    """A plan from the recipe's data, or from assumed lengths, and the assumption in words."""
    load_skeleton(recipe.model, needs_weights=False)  # a name without a model is the user's first mistake to mend
    data: TrainingData
    if records is not None:
        data, assumption = assumed_data(recipe, records)
    else:
        try:
            data, assumption = load_data(recipe, load_tokenizer(recipe.model), progress), ""
        except MachineError as error:
            progress.note(f"planning without the data: {error}")
            data, assumption = assumed_data(recipe, None)
        except ConfigError as error:
            if not str(error).startswith(("model.name", "model.tokenizer")):
                raise
            progress.note(f"planning without the data: {error}")
            data, assumption = assumed_data(recipe, None)
    return plan_for(recipe, data), assumption


def _fit(plan: Plan, forecast: dict[str, Any], target: Target) -> dict[str, Any]:
    available = target.memory_bytes
    needed = forecast["memory"]["peak_bytes"]
    fits = None if available is None else needed <= available
    return {
        "target": {
            "device": target.device_type,
            "here": target.here,
            "name": _device_name(target),
            "memory_bytes": available,
            "memory_source": target.memory_source,
        },
        "fits": fits,
        "advice": advise(plan, target) if fits is False else [],
    }


def _device_name(target: Target) -> str:
    if target.device_type == "cuda":
        return torch.cuda.get_device_name(0) if target.here else "a CUDA card that is not here"
    return target.device_type
