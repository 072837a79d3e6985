"""The composition root: a recipe in, a run folder out. It reads top to bottom like the flow of the data:

config → data → model → objective → optimizer → training loop → evaluation → run record → report
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunelab import cost
from tunelab.config import DPOConfig, ModelConfig, Recipe
from tunelab.data import Dataset, GenerationPrompt, Loader, fixed_sample, generation_prompts, load_records, prepare
from tunelab.errors import ConfigError, DivergedError, Interrupted
from tunelab.models.checkpointing import enable_checkpointing
from tunelab.models.engine import choose_layout
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import load_context_length, load_model, load_tokenizer
from tunelab.objectives import Objective, build_objective
from tunelab.optim import build_optimizer, build_schedule
from tunelab.parallel import resolve_device, resolve_precision, seed_everything, set_threads
from tunelab.progress import Progress
from tunelab.runs import RunFolder, environment_record, now
from tunelab.session import Plan, Session, TrainingData, run_session
from tunelab.training.checkpoint import (
    latest_valid_checkpoint,
    list_checkpoints,
    read_numbers,
    restore_checkpoint,
)
from tunelab.training.loop import StopRequested
from tunelab.training.reference import reference_logprobs
from tunelab.training.signals import StopSignal, catch_stop_signals
from tunelab.training.state import TrainState
from tunelab.training.trackers import build_trackers


def train(
    recipe: Recipe, *, progress: Progress, resume: RunFolder | None = None, allow_drift: bool = False
) -> RunFolder:
    """Run a recipe, or continue `resume`, to its end; returns the run folder with its record and checkpoints.

    Raises TunelabError subclasses for what the user can mend, after writing the run's status; Interrupted, after
    saving, when stopped by a signal.
    """
    began = time.perf_counter()
    with catch_stop_signals() as stop:
        plan = plan_run(recipe, progress)
        run = resume or RunFolder.create(recipe)
        with _recorded(run, stop):
            session = _prepare(run, plan, progress, stop, resume is not None, allow_drift)
            session.state.counters.add_seconds("loading", time.perf_counter() - began)
            try:
                finished = run_session(session)
            finally:
                _record_cost(session)
            if not finished:
                raise StopRequested
            run.update(status="completed", finished=now())
    return run


# --- config → data, before any weights are read ---------------------------------------------------------------------


def plan_run(recipe: Recipe, progress: Progress) -> Plan:
    """Check a recipe against machine, model and data, and say what a run of it will do. No weights are read."""
    check_recipe(recipe)
    data = load_data(recipe, load_tokenizer(recipe.model), progress)
    training = recipe.training
    loader = Loader(
        num_records=len(data.train),
        records_per_step=training.per_device_train_batch_size * training.gradient_accumulation_steps,
        num_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        seed=training.seed,
        shuffle=recipe.data.shuffle,
    )
    return Plan(recipe, data, loader, build_schedule(recipe.optimizer.schedule, loader.num_steps))


def load_data(recipe: Recipe, tokenizer: Any, progress: Progress) -> TrainingData:
    """Read, render and tokenise the recipe's data; what was skipped, cut or dropped is said."""
    config = recipe.data
    wanted = [("train", config.train, config.train_split, config.limit_train)]
    if config.eval is not None:
        wanted.append(("eval", config.eval, config.eval_split, config.limit_eval))
    loss_on = "completions" if isinstance(recipe.method, DPOConfig) else recipe.method.loss_on
    found: dict[str, Dataset] = {}
    for name, source, split, limit in wanted:
        records = load_records(source, split=split, subset=config.subset, on_error=config.on_error, limit=limit)
        found[name] = prepare(
            records,
            tokenizer,
            method=recipe.method.name,
            render=config.render,
            loss_on=loss_on,
            max_length=config.max_length,
        )
        progress.note(f"{name}: {found[name].summary.sentence()}")
    data = TrainingData(found["train"], found.get("eval"))
    if data.overlap:
        progress.note(f"warning: {data.overlap} of {len(data.eval or ())} eval records are in the training data too")
    return data


def check_recipe(recipe: Recipe) -> None:
    """What can be refused before data or weights are read. Raises ConfigError or MachineError."""
    resolve_precision(recipe.model.precision, resolve_device(recipe.model.device))
    if recipe.evaluation.early_stopping_patience is not None and recipe.data.eval is None:
        raise ConfigError("evaluation.early_stopping_patience: needs eval data; set data.eval")
    context = load_context_length(recipe.model)
    if context is not None and recipe.data.max_length > context:
        raise ConfigError(
            f"data.max_length: {recipe.data.max_length} is more than the {context} positions of {recipe.model.name}; "
            f"set it to {context} or less"
        )


# --- model → objective → optimizer ----------------------------------------------------------------------------------


def _prepare(
    run: RunFolder, plan: Plan, progress: Progress, stop: StopSignal, resuming: bool, allow_drift: bool
) -> Session:
    """Build model, objective, reference, optimizer and state; restore the newest good checkpoint when resuming."""
    recipe = plan.recipe
    threads = set_threads(recipe.training.num_threads)
    seed_everything(recipe.training.seed)
    # Same kernels in the same order, so that a resumed run gives the same bits. warn_only: a model may need an
    # operation that has no deterministic CUDA kernel.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    trackers = build_trackers(recipe.tracking.trackers, recipe.tracking.project, run.path, recipe.resolved())
    checkpoint = latest_valid_checkpoint(run.checkpoints, progress.note) if resuming else None
    if resuming and checkpoint is None:
        progress.note("no checkpoint was saved yet: starting from the beginning")
        run.rewind(-1)

    objective = build_objective(recipe.method)
    reference, loaded = _reference_and_model(plan, objective, checkpoint, progress, stop)
    if loaded.layout == "padded":
        progress.note(f"layout: padded ({loaded.layout_reason})")
    if recipe.training.gradient_checkpointing:
        enable_checkpointing(loaded.model)

    optimizer = build_optimizer(loaded.model.named_parameters(), recipe.optimizer, loaded.device.type)
    scaler = torch.amp.GradScaler(loaded.device.type) if loaded.precision.needs_scaler else None
    state = TrainState(loaded, optimizer, scaler)
    fingerprints = _fingerprints(plan, loaded, threads)
    drift: list[str] = []
    if checkpoint is not None:
        drift = _check_drift(read_numbers(checkpoint)["fingerprints"], fingerprints, allow_drift, progress)
        restore_checkpoint(checkpoint, state)
        run.rewind(state.step)
        progress.note(f"resuming after step {state.step}")

    resumes = list(run.record().get("resumes", []))
    if resuming:
        resumes.append({"time": now(), "step": state.step, "drift": drift})
        run.write_recipe(recipe)
    run.update(status="running", error=None, resumes=resumes, data=plan.data.record(), model=_describe(loaded))
    return Session(
        run=run,
        plan=plan,
        state=state,
        objective=objective,
        reference=reference,
        prompts=_generation_prompts(plan, loaded),
        trackers=trackers,
        fingerprints=fingerprints,
        shape=cost.ModelShape.of(loaded.model),
        meter=cost.ThroughputMeter(),
        progress=progress,
        stop=stop,
    )


def _reference_and_model(
    plan: Plan, objective: Objective, checkpoint: Path | None, progress: Progress, stop: StopSignal
) -> tuple[dict[str, np.ndarray], LoadedModel]:
    """Reference log-probabilities by data set name, and the model to train. Never two models in memory at once."""
    recipe, start = plan.recipe, plan.recipe.model
    reference: dict[str, np.ndarray] = {}
    loaded: LoadedModel | None = None
    if objective.needs_reference and isinstance(recipe.method, DPOConfig):
        loaded = _load(start.at(recipe.method.reference) if recipe.method.reference else start, progress)
        if recipe.method.reference is not None:
            _check_same_tokens(recipe, loaded)
        wanted = _records_needing_a_reference(plan)
        found = reference_logprobs(loaded, list(wanted.values()), progress, stop)
        reference = dict(zip(wanted, found, strict=True))
        if recipe.method.reference is not None or checkpoint is not None:
            loaded = None
    if loaded is None:
        loaded = _load(start if checkpoint is None else start.at(str(checkpoint)), progress)
    return reference, loaded


def _records_needing_a_reference(plan: Plan) -> dict[str, tuple[Dataset, np.ndarray]]:
    """By data set name: what is trained on (a run may be shorter than an epoch), and what is evaluated."""
    data, seed, samples = plan.data, plan.recipe.training.seed, plan.recipe.evaluation.eval_samples
    steps = [plan.loader.indices(step) for step in range(plan.loader.num_steps)]
    trained = np.unique(np.concatenate([*steps, fixed_sample(len(data.train), samples, seed)]))
    wanted = {"train": (data.train, trained)}
    if data.eval is not None:
        wanted["eval"] = (data.eval, fixed_sample(len(data.eval), samples, seed))
    return wanted


def _generation_prompts(plan: Plan, loaded: LoadedModel) -> list[GenerationPrompt]:
    config, context = plan.recipe.evaluation, loaded.context_length
    room = None if context is None else context - config.max_new_tokens
    dataset, seed = plan.data.eval or plan.data.train, plan.recipe.training.seed
    return generation_prompts(dataset, loaded.tokenizer, config.generation_prompts, seed, room)


def _check_same_tokens(recipe: Recipe, reference: LoadedModel) -> None:
    if load_tokenizer(recipe.model).get_vocab() != reference.tokenizer.get_vocab():
        raise ConfigError(
            f"method.reference: {reference.source} and {recipe.model.name} have different tokenizers, so their "
            "log-probabilities cannot be compared; use a reference with the model's own tokenizer"
        )


def _load(config: ModelConfig, progress: Progress) -> LoadedModel:
    loaded = load_model(config)
    choose_layout(loaded, config.layout)
    progress.note(
        f"model: {config.name}, {loaded.num_parameters / 1e6:.1f} M parameters, "
        f"{loaded.device.type}, {loaded.precision.name}, {loaded.layout} rows"
    )
    return loaded


def _describe(loaded: LoadedModel) -> dict[str, Any]:
    return {
        "source": loaded.source,
        "architecture": type(loaded.model).__name__,
        "parameters": loaded.num_parameters,
        "device": str(loaded.device),
        "precision": loaded.precision.name,
        "layout": loaded.layout,
        "layout_reason": loaded.layout_reason,
    }


def _fingerprints(plan: Plan, loaded: LoadedModel, threads: int) -> dict[str, Any]:
    """What must not change between the sessions of a run if its bits are to be the same."""
    data, versions = plan.data, environment_record()["versions"]
    return {
        "recipe": plan.recipe.fingerprint(),
        "train data": data.train.fingerprint,
        "eval data": data.eval.fingerprint if data.eval else None,
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "device": loaded.device.type,
        "precision": loaded.precision.name,
        "layout": loaded.layout,
        "threads": threads,
        "world size": 1,
    }


def _check_drift(before: dict[str, Any], current: dict[str, Any], allow: bool, progress: Progress) -> list[str]:
    """What changed since the checkpoint, as sentences for the record. Raises ConfigError unless it is allowed."""
    changed = [f"{key} ({before.get(key)} → {current.get(key)})" for key in current if before.get(key) != current[key]]
    if changed and not allow:
        raise ConfigError(
            f"--resume: changed since the checkpoint: {', '.join(changed)}; the result would not be the unbroken "
            "run's. Restore it, or accept with --allow-drift"
        )
    if changed:
        progress.note(f"drift accepted: {', '.join(changed)}")
    return changed


# --- the run record -------------------------------------------------------------------------------------------------


@contextmanager
def _recorded(run: RunFolder, stop: StopSignal) -> Iterator[None]:
    """Whatever ends the run, run.json says so; a stop becomes an error that names the command to continue."""
    try:
        yield
    except StopRequested:
        run.update(status="interrupted", finished=now())
        where = "saved" if list_checkpoints(run.checkpoints) else "nothing to save yet"
        method = run.record()["method"]
        raise Interrupted(
            f"stopped ({where}); continue with: tunelab {method} --resume {run.path}", stop.exit_code
        ) from None
    except DivergedError as error:
        run.update(status="diverged", finished=now(), error=str(error))
        raise
    except Exception as error:
        run.update(status="failed", finished=now(), error=str(error) or type(error).__name__)
        raise


def _record_cost(session: Session) -> None:
    """What was paid and what was reached, also of a run that did not finish."""
    counters, evaluation = session.state.counters, session.state.evaluation
    rows = session.run.metrics("eval")
    seconds = {**counters.seconds, "total": sum(counters.seconds.values())}
    cost_record = asdict(counters) | {"steps": counters.step, "seconds": seconds}
    cost_record["tokens_per_second"] = counters.tokens / max(seconds.get("training", 0.0), 1e-9)
    session.run.update(
        cost=cost_record,
        result={key: value for key, value in rows[-1].items() if "/" in key} if rows else {},
        best={"step": evaluation.best_step, "eval/loss": evaluation.best_loss} if evaluation.best_step else None,
    )
