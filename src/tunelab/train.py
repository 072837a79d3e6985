"""The composition root: a recipe in, a run folder out. It reads top to bottom like the flow of the data:

    config → data → model → objective → optimizer → training loop → evaluation → run record → report
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunelab import cost
from tunelab.config import DPOConfig, ModelConfig, Recipe
from tunelab.data import Dataset, GenerationPrompt, Loader, fixed_sample, generation_prompts, load_records, pack, prepare
from tunelab.errors import ConfigError, DivergedError, Interrupted, TunelabError
from tunelab.evaluation.heldout import evaluate_objective
from tunelab.models.checkpointing import enable_checkpointing
from tunelab.models.engine import choose_layout
from tunelab.models.generation import GenerationSettings, generate
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import load_model, load_skeleton, load_tokenizer
from tunelab.objectives import Objective, build_objective
from tunelab.optim import build_optimizer, build_schedule
from tunelab.parallel import peak_memory_bytes, resolve_device, resolve_precision, seed_everything, set_threads
from tunelab.progress import Progress
from tunelab.runs import RunFolder, now
from tunelab.training.checkpoint import (
    checkpoint_name,
    latest_valid_checkpoint,
    list_checkpoints,
    point_best,
    prune_checkpoints,
    read_numbers,
    restore_checkpoint,
    save_checkpoint,
)
from tunelab.training.loop import Hook, StopRequested, run_loop
from tunelab.training.reference import reference_logprobs
from tunelab.training.signals import StopSignal, catch_stop_signals
from tunelab.training.state import TrainState
from tunelab.training.step import MicroBatch, train_step
from tunelab.training.trackers import Tracker, build_trackers
from tunelab.types import Metrics

EVALUATIONS_PER_RUN = 5
"""Default of `evaluation.eval_steps`: this many a run, beside the one before the first step."""


def train(
    recipe: Recipe, *, progress: Progress, resume: RunFolder | None = None, allow_drift: bool = False
) -> RunFolder:
    """Run a recipe, or continue `resume`, to its end; returns the run folder with its record and checkpoints.

    Raises TunelabError subclasses for what the user can mend, after writing the run's status; Interrupted, after
    saving, when stopped by a signal.
    """
    began = time.perf_counter()
    with catch_stop_signals() as stop:
        _check_machine(recipe)
        tokenizer = load_tokenizer(recipe.model)
        data = load_data(recipe, tokenizer, progress)
        run = resume or RunFolder.create(recipe)
        with _recorded(run, stop):
            session = _prepare(run, recipe, data, progress, stop, resume is not None, allow_drift)
            session.state.counters.add_seconds("loading", time.perf_counter() - began)
            finished = _run(session)
            if not finished:
                raise StopRequested
            _record_result(session)
    return run


# --- config → data -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is measured with."""

    train: Dataset
    eval: Dataset | None

    def record(self) -> dict[str, Any]:
        return {"train": self.train.summary.to_json(), "eval": self.eval.summary.to_json() if self.eval else None}


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
    return TrainingData(found["train"], found.get("eval"))


def _check_machine(recipe: Recipe) -> None:
    """What can be refused before anything is read."""
    resolve_precision(recipe.model.precision, resolve_device(recipe.model.device))
    if recipe.evaluation.early_stopping_patience is not None and recipe.data.eval is None:
        raise ConfigError("evaluation.early_stopping_patience: needs eval data; set data.eval")


def _loader(recipe: Recipe, num_records: int) -> Loader:
    training = recipe.training
    return Loader(
        num_records=num_records,
        records_per_step=training.per_device_train_batch_size * training.gradient_accumulation_steps,
        num_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        seed=training.seed,
        shuffle=recipe.data.shuffle,
    )


# --- model → objective → optimizer -------------------------------------------------------------------------------------


@dataclass
class Session:
    """Everything one process needs to carry a run on: the recipe's objects, built."""

    run: RunFolder
    recipe: Recipe
    data: TrainingData
    state: TrainState
    objective: Objective
    loader: Loader
    reference: dict[str, np.ndarray]
    prompts: list[GenerationPrompt]
    trackers: list[Tracker]
    fingerprints: dict[str, Any]
    shape: cost.ModelShape
    meter: cost.ThroughputMeter
    progress: Progress
    stop: StopSignal


def _prepare(
    run: RunFolder,
    recipe: Recipe,
    data: TrainingData,
    progress: Progress,
    stop: StopSignal,
    resuming: bool,
    allow_drift: bool,
) -> Session:
    """Build model, objective, reference, optimizer and state; restore the newest good checkpoint when resuming."""
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
    reference, loaded = _reference_and_model(recipe, objective, data, checkpoint, progress, stop)
    _check_context(recipe, loaded)
    if loaded.layout == "padded":
        progress.note(f"layout: padded ({loaded.layout_reason})")
    if recipe.training.gradient_checkpointing:
        enable_checkpointing(loaded.model)

    optimizer = build_optimizer(loaded.model.named_parameters(), recipe.optimizer, loaded.device.type)
    scaler = torch.amp.GradScaler(loaded.device.type) if loaded.precision.needs_scaler else None
    state = TrainState(loaded, optimizer, scaler)
    fingerprints = _fingerprints(run, recipe, data, loaded, threads)
    if checkpoint is not None:
        _check_drift(read_numbers(checkpoint)["fingerprints"], fingerprints, allow_drift, progress)
        restore_checkpoint(checkpoint, state)
        run.rewind(state.step)
        progress.note(f"resuming after step {state.step}")

    resumes = [*run.record().get("resumes", []), {"time": now(), "step": state.step}] if resuming else []
    run.update(status="running", error=None, resumes=resumes, data=data.record(), model=_describe(loaded))
    prompts_from = data.eval or data.train
    return Session(
        run=run,
        recipe=recipe,
        data=data,
        state=state,
        objective=objective,
        loader=_loader(recipe, len(data.train.examples)),
        reference=reference,
        prompts=generation_prompts(
            prompts_from, loaded.tokenizer, recipe.evaluation.generation_prompts, recipe.training.seed
        ),
        trackers=trackers,
        fingerprints=fingerprints,
        shape=cost.ModelShape.of(loaded.model),
        meter=cost.ThroughputMeter(),
        progress=progress,
        stop=stop,
    )


def _reference_and_model(
    recipe: Recipe,
    objective: Objective,
    data: TrainingData,
    checkpoint: Path | None,
    progress: Progress,
    stop: StopSignal,
) -> tuple[dict[str, np.ndarray], LoadedModel]:
    """Reference log-probabilities by data set name, and the model to train. Never two models in memory at once."""
    start = recipe.model
    reference: dict[str, np.ndarray] = {}
    loaded: LoadedModel | None = None
    if objective.needs_reference and isinstance(recipe.method, DPOConfig):
        source = start.model_copy(update={"name": recipe.method.reference}) if recipe.method.reference else start
        loaded = _load(source, progress)
        names = ["train", "eval"] if data.eval is not None else ["train"]
        datasets = [data.train] if data.eval is None else [data.train, data.eval]
        reference = dict(zip(names, reference_logprobs(loaded, datasets, progress, stop), strict=True))
        if recipe.method.reference is not None or checkpoint is not None:
            loaded = None
    if loaded is None:
        loaded = _load(start if checkpoint is None else start.model_copy(update={"name": str(checkpoint)}), progress)
    return reference, loaded


def _load(config: ModelConfig, progress: Progress) -> LoadedModel:
    loaded = load_model(config)
    choose_layout(loaded, config.layout)
    progress.note(
        f"model: {config.name}, {loaded.num_parameters / 1e6:.1f} M parameters, "
        f"{loaded.device.type}, {loaded.precision.name}, {loaded.layout} rows"
    )
    return loaded


def _check_context(recipe: Recipe, loaded: LoadedModel) -> None:
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    if context is not None and recipe.data.max_length > context:
        raise ConfigError(
            f"data.max_length: {recipe.data.max_length} is more than the {context} positions of {recipe.model.name}; "
            f"set it to {context} or less"
        )


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


def _fingerprints(
    run: RunFolder, recipe: Recipe, data: TrainingData, loaded: LoadedModel, threads: int
) -> dict[str, Any]:
    """What must not change between the sessions of a run if its bits are to be the same."""
    versions = run.record()["versions"]
    return {
        "recipe": recipe.fingerprint(),
        "train data": data.train.fingerprint,
        "eval data": data.eval.fingerprint if data.eval else None,
        "torch": torch.__version__,
        "transformers": versions["transformers"],
        "device": loaded.device.type,
        "precision": loaded.precision.name,
        "layout": loaded.layout,
        "threads": threads,
        "world size": 1,
    }


def _check_drift(before: dict[str, Any], current: dict[str, Any], allow: bool, progress: Progress) -> None:
    changed = [f"{key} ({before.get(key)} → {current.get(key)})" for key in current if before.get(key) != current[key]]
    if not changed:
        return
    text = ", ".join(changed)
    if not allow:
        raise ConfigError(
            f"--resume: changed since the checkpoint: {text}; the result would not be the unbroken run's. "
            "Restore it, or accept with --allow-drift"
        )
    progress.note(f"drift accepted: {text}")


# --- training loop → evaluation ----------------------------------------------------------------------------------------


def _run(session: Session) -> bool:
    """The loop with its hooks. True if the run is finished, False if it was stopped and saved."""
    recipe, state, num_steps = session.recipe, session.state, session.loader.num_steps
    schedule = build_schedule(recipe.optimizer.schedule, num_steps)
    eval_steps = recipe.evaluation.eval_steps or max(1, -(-num_steps // EVALUATIONS_PER_RUN))
    session.progress.start("training", num_steps, state.step)
    try:
        finished = run_loop(
            state,
            num_steps=num_steps,
            step=lambda state: _step(session, recipe.optimizer.learning_rate * schedule(state.step)),
            hooks=[
                Hook(eval_steps, lambda state: _evaluate(session)),
                Hook(1, lambda state: _save_if_due(session)),
            ],
            save=lambda state: _save(session),
            stop_requested=session.stop,
        )
    finally:
        for tracker in session.trackers:
            tracker.close()
    session.progress.finish("training")
    return finished


def _step(session: Session, learning_rate: float) -> None:
    """One optimizer step: its micro-batches packed, trained on, counted and logged."""
    began = time.perf_counter()
    recipe, state, counters = session.recipe, session.state, session.state.counters
    micro_batches = [
        _micro_batch(session.data.train, indices, session.reference.get("train"))
        for indices in session.loader.micro_batches(state.step, recipe.training.per_device_train_batch_size)
    ]
    metrics = train_step(
        state,
        session.objective,
        micro_batches,
        learning_rate=learning_rate,
        max_grad_norm=recipe.training.max_grad_norm,
    )
    counters.step += 1
    tokens = 0
    for micro in micro_batches:
        batch = micro.batch
        tokens += batch.num_tokens
        counters.samples += len(batch.record_ids)
        counters.loss_tokens += len(batch.targets)
        counters.flops += cost.training_flops(
            session.shape, batch.num_tokens, len(batch.targets), cost.attention_pairs(batch)
        )
    counters.tokens += tokens
    counters.flops_6nd += cost.classic_training_flops(session.shape.block_matmul_parameters, tokens)
    counters.peak_memory_bytes = max(counters.peak_memory_bytes, peak_memory_bytes(state.loaded.device))
    counters.add_seconds("training", time.perf_counter() - began)
    session.meter.update(tokens)
    metrics |= {
        "tokens_per_second": session.meter.tokens_per_second,
        "memory/peak_bytes": counters.peak_memory_bytes,
        "samples": counters.samples,
        "tokens": counters.tokens,
        "flops": counters.flops,
    }
    if counters.step % recipe.training.logging_steps == 0:
        _log(session, "train", metrics)
    session.progress.advance(
        "training",
        loss=metrics["train/loss"],
        tokens_per_second=metrics["tokens_per_second"],
        peak_bytes=counters.peak_memory_bytes,
    )


def _micro_batch(dataset: Dataset, indices: np.ndarray, reference: np.ndarray | None) -> MicroBatch:
    batch = pack([dataset.examples[i] for i in indices], indices.tolist())
    return MicroBatch(batch, None if reference is None else torch.from_numpy(reference[indices]))


def _evaluate(session: Session) -> None:
    """Loss and metrics on fixed random samples of eval and train data, and answers to fixed prompts."""
    state, evaluation = session.state, session.state.evaluation
    if evaluation.last_step == state.step:
        return  # done before the checkpoint this session resumed from
    with session.meter.pause(), _timed(state, "evaluation"):
        metrics = _measure(session)
        answers = _answers(session)
        _log(session, "eval", metrics)
        for prompt, answer in zip(session.prompts, answers, strict=True):
            session.run.log_sample(state.step, prompt.text, answer, prompt.reference)
    evaluation.last_step = state.step
    shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.endswith(("loss", "accuracies")))
    session.progress.note(f"step {state.step}: {shown}")
    loss = metrics.get("eval/loss")
    if loss is None or state.step == 0:
        return
    patience, threshold = (
        session.recipe.evaluation.early_stopping_patience,
        session.recipe.evaluation.early_stopping_threshold,
    )
    if evaluation.best_loss is None or loss < evaluation.best_loss - threshold:
        evaluation.without_improvement = 0
    else:
        evaluation.without_improvement += 1
    if evaluation.best_loss is None or loss < evaluation.best_loss:
        evaluation.best_loss, evaluation.best_step = loss, state.step
    if patience is not None and evaluation.without_improvement >= patience:
        state.stop_early = True
        session.progress.note(f"stopping early: no better eval/loss in {patience} evaluations")


def _measure(session: Session) -> Metrics:
    config, seed = session.recipe.evaluation, session.recipe.training.seed
    metrics: Metrics = {}
    for prefix, name, dataset in (("eval", "eval", session.data.eval), ("eval_train", "train", session.data.train)):
        if dataset is None:
            continue
        task = f"evaluation ({name} data)"
        indices = fixed_sample(len(dataset.examples), config.eval_samples, seed)
        session.progress.start(task, len(indices))

        def on_records(count: int, task: str = task) -> None:
            session.progress.advance(task, count)
            if session.stop():
                raise StopRequested

        measured = evaluate_objective(
            session.state.loaded,
            session.objective,
            dataset,
            indices,
            session.reference.get(name),
            batch_size=config.per_device_eval_batch_size,
            on_records=on_records,
        )
        session.progress.finish(task)
        metrics |= {f"{prefix}/{metric}": value for metric, value in measured.items()}
    return metrics


def _answers(session: Session) -> list[str]:
    config = session.recipe.evaluation
    if not session.prompts:
        return []
    settings = GenerationSettings(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=session.recipe.training.seed
    )
    return [answer.text for answer in generate(session.state.loaded, [p.ids for p in session.prompts], settings)]


def _log(session: Session, phase: str, metrics: Metrics) -> None:
    session.run.log_metrics(session.state.step, phase, metrics)
    for tracker in session.trackers:
        tracker.log(session.state.step, metrics)


# --- checkpoints and the run record ------------------------------------------------------------------------------------


def _save_if_due(session: Session) -> None:
    step = session.state.step
    if step and (step % session.recipe.training.save_steps == 0 or session.state.evaluation.best_step == step):
        _save(session)


def _save(session: Session) -> None:
    """A checkpoint of this step, the `best` link, and only then the removal of old ones."""
    run, state = session.run, session.state
    best = state.evaluation.best_step
    with session.meter.pause(), _timed(state, "checkpoint"):
        path = save_checkpoint(run.checkpoints, state, session.fingerprints)
        best_path = run.checkpoints / checkpoint_name(best) if best is not None else None
        if best_path is not None and best_path.exists():
            point_best(run.path / "best", best_path)
        prune_checkpoints(run.checkpoints, session.recipe.training.save_total_limit, path, best_path)


@contextmanager
def _timed(state: TrainState, phase: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        state.counters.add_seconds(phase, time.perf_counter() - began)


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
    except (TunelabError, OSError, RuntimeError, MemoryError, ArithmeticError, LookupError, TypeError) as error:
        run.update(status="failed", finished=now(), error=str(error) or type(error).__name__)
        raise


def _record_result(session: Session) -> None:
    counters, evaluation = session.state.counters, session.state.evaluation
    rows = session.run.metrics("eval")
    seconds = {**counters.seconds, "total": sum(counters.seconds.values())}
    result = {key: value for key, value in rows[-1].items() if "/" in key} if rows else {}
    costs = asdict(counters) | {"steps": counters.step, "seconds": seconds}
    costs["tokens_per_second"] = counters.tokens / max(seconds.get("training", 0.0), 1e-9)
    best = None
    if evaluation.best_step is not None:
        best = {"step": evaluation.best_step, "eval/loss": evaluation.best_loss}
    session.run.update(status="completed", finished=now(), cost=costs, result=result, best=best)


# --- before anything is paid -------------------------------------------------------------------------------------------


def forecast(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """What a run would do: everything validated, data read and tokenised, the model built without weights."""
    _check_machine(recipe)
    device = resolve_device(recipe.model.device)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer, progress)
    loader = _loader(recipe, len(data.train.examples))
    build_schedule(recipe.optimizer.schedule, loader.num_steps)
    skeleton = load_skeleton(recipe.model)
    shape = cost.ModelShape.of(skeleton)
    totals = {"records": 0, "tokens": 0, "loss_tokens": 0, "flops": 0.0}
    for step in range(loader.num_steps):
        for indices in loader.micro_batches(step, recipe.training.per_device_train_batch_size):
            batch = _micro_batch(data.train, indices, None).batch
            totals["records"] += len(indices)
            totals["tokens"] += batch.num_tokens
            totals["loss_tokens"] += len(batch.targets)
            totals["flops"] += cost.training_flops(
                shape, batch.num_tokens, len(batch.targets), cost.attention_pairs(batch)
            )
    parameters = sum(p.numel() for p in skeleton.parameters())
    return {
        "method": recipe.method.name,
        "model": {"name": recipe.model.name, "parameters": parameters},
        "device": str(device),
        "precision": resolve_precision(recipe.model.precision, device).name,
        "steps": loader.num_steps,
        **totals,
        "disk_bytes": _checkpoint_bytes(recipe, parameters) * (recipe.training.save_total_limit + 2),
        "data": data.record(),
        "fingerprint": recipe.fingerprint(),
    }


def _checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """Weights and optimizer state of one checkpoint. Kept at once: the limit, the best, and the one being written."""
    bytes_each = 2 if recipe.model.precision == "bf16-pure" else 4
    momentum = getattr(recipe.optimizer, "momentum", None)
    slots = 2 if momentum is None else int(momentum > 0)
    return parameters * bytes_each * (1 + slots)
