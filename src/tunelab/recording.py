"""What a run writes down about itself: what it was made with, how it ended, what it cost; and what may not change
between its sessions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from tunelab.config import parse_recipe
from tunelab.errors import ConfigError, DivergedError, Interrupted, OutOfMemory, is_out_of_memory
from tunelab.forecast import Target, run_forecast
from tunelab.forecast.measured import beside_measured
from tunelab.manifest import list_checkpoints
from tunelab.parallel import (
    device_name,
    resolve_device,
    resolve_precision,
    set_threads,
)
from tunelab.progress import Progress, format_bytes
from tunelab.runs import RunFolder, environment_record, now
from tunelab.session import Plan, Session
from tunelab.training.loop import StopRequested
from tunelab.training.signals import StopSignal


def fingerprints_of(plan: Plan) -> dict[str, Any]:
    """What must not change between the sessions of a run if its bits are to be the same."""
    data, versions = plan.data, environment_record()["versions"]
    device = resolve_device(plan.recipe.model.device)
    return {
        "recipe": plan.recipe.fingerprint(),
        "train data": data.train.fingerprint,
        "eval data": data.eval.fingerprint if data.eval else None,
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "device": device_name(device),
        "precision": resolve_precision(plan.recipe.model.precision, device).name,
        "threads": set_threads(None),
        "world size": 1,
    }


def check_drift(run: RunFolder, plan: Plan, allow: bool, progress: Progress) -> list[str]:
    """What changed since the run's last session, in words. Raises ConfigError unless it is allowed.

    The recipe is compared by key, so that what changed can be named.
    """
    before, current = run.record().get("fingerprints", {}), fingerprints_of(plan)
    changed = [key for key in before if before[key] != current.get(key)]
    told = [
        key if key.endswith("data") else f"{key} ({before[key]} → {current.get(key)})"
        for key in changed
        if key != "recipe"
    ]
    if "recipe" in changed:
        differences = run.recipe().differences(plan.recipe)
        if fixed := [key for key, _, _ in differences if key.split(".")[0] == "adapter"]:
            raise ConfigError(f"--resume: {fixed[0]}: an adapter keeps the form it was made with; start a new run")
        told += [f"{key} ({old} → {new})" for key, old, new in differences]
    if told and not allow:
        raise ConfigError(
            f"--resume: changed since the run began: {', '.join(told)}; the result would not be the unbroken run's. "
            "Restore it, or accept with --allow-drift"
        )
    if told:
        progress.note(f"drift accepted: {', '.join(told)}")
    return told


def check_same_reference(run: RunFolder, reference: dict[str, np.ndarray]) -> None:
    """The reference is a model elsewhere (another run, a hub name) and may have moved on between two sessions."""
    if not reference:
        return
    digest = hashlib.sha256(b"".join(values.tobytes() for values in reference.values())).hexdigest()
    before = run.record().get("reference")
    if before not in (None, digest):
        raise ConfigError(
            "--resume: the reference model's log-probabilities are not those the run began with: the model it started "
            "from has changed. Restore that model, or start a new run"
        )
    run.update(reference=digest)


@contextmanager
def recorded(run: RunFolder, stop: StopSignal) -> Iterator[None]:
    """Whatever ends the run, run.json says so; a stop becomes an error that names the command to continue."""
    before = run.record()["status"]
    try:
        yield
    except StopRequested:
        run.update(status="interrupted", finished=now())
        where = "saved" if list_checkpoints(run.checkpoints) else "nothing to save yet"
        method = run.record()["method"]
        raise Interrupted(
            f"stopped ({where}); continue with: tunelab {method} --resume {run.path}", stop.exit_code
        ) from None
    except Exception as error:
        if isinstance(error, ConfigError) and before != "created":
            status = before  # a refused resume leaves a run what it was
        else:
            status = "diverged" if isinstance(error, DivergedError) else "failed"
        with suppress(OSError):  # the disk that filled up holds run.json too; the error itself matters more
            run.update(status=status, finished=now(), error=str(error) or type(error).__name__)
        raise


@contextmanager
def advised(run: RunFolder, plan: Plan, target: Target) -> Iterator[None]:
    """Want of memory that smaller portions could not answer ends the run with what could, as far as is forecast."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
            raise
        told = str(error) if isinstance(error, OutOfMemory) else "out of memory"
        raise OutOfMemory(
            f"{told}. {advice(plan, target)}; `tunelab plan {run.path / 'config.yaml'}` says what fits"
        ) from error


def advice(plan: Plan, target: Target) -> str:
    """The nearest changes that need less memory, with their forecast peaks; of shorter sequences only the data tell."""
    recipe = plan.recipe
    before = run_forecast(plan, target)["memory"]["peak_bytes"]
    changes = []
    if recipe.adapter is None:
        changes.append("adapter.name=lora")
    elif recipe.adapter.name == "lora" and not recipe.model.load_in_4bit:
        changes.append("model.load_in_4bit=true")
    if not recipe.training.gradient_checkpointing:
        changes.insert(0, "training.gradient_checkpointing=true")
    told = []
    for change in changes:
        data = {name: section for name, section in recipe.resolved().items() if section is not None}
        peak = run_forecast(replace(plan, recipe=parse_recipe(data, [change])), target)["memory"]["peak_bytes"]
        if peak < before:
            told.append(f"{change} ({format_bytes(peak)}), ")
    shorter = f"data.max_length={max(2, recipe.data.max_length // 2)}"
    return f"The forecast was {format_bytes(before)}; try {''.join(told)}or {shorter}".replace("try or", "try")


def record_cost(session: Session) -> None:
    """What was paid and what was reached, also of a run that did not finish."""
    counters, evaluation = session.state.counters, session.state.evaluation
    rows = session.run.metrics("eval")
    seconds = {**counters.seconds, "total": sum(counters.seconds.values())}
    cost_record = asdict(counters) | {"steps": counters.step, "seconds": seconds}
    training = seconds.get("training", 0.0)
    cost_record["tokens_per_second"] = counters.tokens / max(training, 1e-9)
    cost_record["matmul_ceiling_flops_per_second"] = session.matmul_ceiling
    cost_record["utilisation"] = counters.floor_flops / training / session.matmul_ceiling if training else None
    saved = list_checkpoints(session.run.checkpoints)
    cost_record["checkpoint_bytes"] = sum(file.stat().st_size for file in saved[-1].iterdir()) if saved else None
    session.run.update(
        cost=cost_record,
        forecast_and_measured=beside_measured(session.run.record()["forecast"], cost_record),
        result={key: value for key, value in rows[-1].items() if "/" in key} if rows else {},
        best={"step": evaluation.best_step, "eval/loss": evaluation.best_loss} if evaluation.best_step else None,
    )
