"""The composition root: a recipe in, a run folder out. It reads top to bottom like the flow of the data:

config → data → model → objective → optimizer → training loop → evaluation → run record → report
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunelab import cost
from tunelab.config import DPOConfig, Recipe, parse_recipe
from tunelab.config.optimizers import BAdamConfig, LISAConfig
from tunelab.data import Dataset, GenerationPrompt, Loader, Settings, fixed_sample, generation_prompts, load_dataset
from tunelab.errors import ConfigError, DivergedError, Interrupted, OutOfMemory, is_out_of_memory
from tunelab.forecast import Target, detect_target, run_forecast
from tunelab.forecast.measured import beside_measured
from tunelab.manifest import list_checkpoints
from tunelab.models.adapters import adapt_skeleton, attach_adapter, learning_rate_scales
from tunelab.models.adapters.partial import find_blocks
from tunelab.models.checkpointing import enable_checkpointing
from tunelab.models.engine import check_checkpointing, choose_layout
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import check_foldable, load_context_length, load_model, load_skeleton, load_tokenizer
from tunelab.models.quantised import check_bitsandbytes
from tunelab.objectives import Objective, build_objective
from tunelab.optim import (
    LayerSampler,
    ParameterRoles,
    Updates,
    build_optimizer,
    build_sampler,
    build_schedule,
    check_optimizer,
    optimizer_note,
)
from tunelab.parallel import (
    deterministic,
    device_name,
    keep_freed_memory,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
    seed_everything,
    set_threads,
)
from tunelab.progress import Progress, format_bytes
from tunelab.runs import RunFolder, environment_record, now
from tunelab.session import Plan, Session, TrainingData, check_release, record_smaller_portion, run_session
from tunelab.training.checkpoint import (
    latest_valid_checkpoint,
    restore_checkpoint,
)
from tunelab.training.loop import StopRequested
from tunelab.training.reference import reference_logprobs
from tunelab.training.signals import StopSignal, catch_stop_signals
from tunelab.training.state import TrainState
from tunelab.training.trackers import build_trackers, check_trackers


def train(
    recipe: Recipe, *, progress: Progress, resume: RunFolder | None = None, allow_drift: bool = False
) -> RunFolder:
    """Run a recipe, or continue `resume`, to its end; returns the run folder with its record and checkpoints.

    Raises TunelabError subclasses for what the user can mend, after writing the run's status; Interrupted, after
    saving, when stopped by a signal.
    """
    began = time.perf_counter()
    with catch_stop_signals() as stop, deterministic():
        if resume is None:
            RunFolder.check_name(recipe)
        plan = plan_run(recipe, progress)
        set_threads(recipe.training.num_threads)
        keep_freed_memory()
        drift = [] if resume is None else check_drift(resume, plan, allow_drift, progress)
        target = detect_target(recipe.model.device)  # here: what a run imports is imported, and nothing else is loaded
        run = resume or RunFolder.create(recipe)
        with run.locked(), _recorded(run, stop), _advised(run, plan, target):
            run.write_recipe(recipe)
            run.update(
                status="running",
                finished=None,
                error=None,
                fingerprint=recipe.fingerprint(),
                fingerprints=_fingerprints(plan),
            )
            run.update(forecast=run_forecast(plan, target))
            session = _prepare(run, plan, progress, stop, drift if resume is not None else None)
            ready = time.perf_counter() - began
            session.state.counters.add_seconds("reference", session.reference_seconds)
            session.state.counters.add_seconds("loading", ready - session.reference_seconds)
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
    return plan_for(recipe, load_data(recipe, load_tokenizer(recipe.model), progress))


def plan_for(recipe: Recipe, data: TrainingData) -> Plan:
    """What a run of a checked recipe does on its data."""
    training = recipe.training
    loader = Loader(
        num_records=len(data.train),
        records_per_step=training.per_device_train_batch_size * training.gradient_accumulation_steps,
        num_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        seed=training.seed,
        shuffle=recipe.data.shuffle,
    )
    plan = Plan(recipe, data, loader, build_schedule(recipe.optimizer.schedule, loader.num_steps))
    check_release(plan)
    return plan


def load_data(recipe: Recipe, tokenizer: Any, progress: Progress) -> TrainingData:
    """Read, render and tokenise the recipe's data; what was skipped, cut or dropped is said."""
    config = recipe.data
    wanted = [("train", config.train, config.train_split, config.limit_train)]
    if config.eval is not None:
        wanted.append(("eval", config.eval, config.eval_split, config.limit_eval))
    settings = Settings(
        method=recipe.method.name,
        render=config.render,
        loss_on="completions" if isinstance(recipe.method, DPOConfig) else recipe.method.loss_on,
        max_length=config.max_length,
        on_error=config.on_error,
    )
    found: dict[str, Dataset] = {}
    for name, source, split, limit in wanted:
        found[name] = load_dataset(
            source, tokenizer, settings, split=split, subset=config.subset, limit=limit, progress=progress
        )
        progress.note(f"{name}: {found[name].summary.sentence()}")
    data = TrainingData(found["train"], found.get("eval"))
    if data.overlap:
        progress.note(f"warning: {data.overlap} of {len(data.eval or ())} eval records are in the training data too")
    return data


def check_recipe(recipe: Recipe) -> None:
    """What can be refused before data or weights are read. Raises ConfigError or MachineError."""
    precision = resolve_precision(recipe.model.precision, resolve_device(recipe.model.device))
    if precision.needs_scaler and recipe.training.gradient_release:
        raise ConfigError(
            "training.gradient_release: fp16 scales its gradients, and finds an overflow only once all are there; set "
            "model.precision to bf16 or float32"
        )
    check_trackers(recipe.tracking.trackers)
    if recipe.evaluation.early_stopping_patience is not None and recipe.data.eval is None:
        raise ConfigError("evaluation.early_stopping_patience: needs eval data; set data.eval")
    if recipe.model.load_in_4bit and (recipe.adapter is None or recipe.adapter.name == "partial"):
        raise ConfigError(
            "model.load_in_4bit: 4-bit weights cannot learn, adapters beside them can; add adapter: {name: lora}"
        )
    if recipe.model.load_in_4bit:
        check_bitsandbytes()
    check_foldable(recipe.model)
    skeleton = None
    if recipe.adapter is not None:
        skeleton = load_skeleton(recipe.model)
        adapt_skeleton(skeleton, recipe.adapter)  # refuses targets that name no layer
    check_optimizer(recipe.optimizer, skeleton)
    if isinstance(recipe.optimizer, LISAConfig | BAdamConfig):
        _build_sampler(recipe, skeleton or load_skeleton(recipe.model), num_steps=1)  # refuses what has no layers
    models = [recipe.model]
    if isinstance(recipe.method, DPOConfig) and recipe.method.reference is not None:
        models.append(recipe.model.at(recipe.method.reference))
    for model in models:
        context = load_context_length(model)
        own = f"{context} positions of {model.name}"
        if context is not None and model is recipe.model and recipe.num_virtual_tokens:
            context -= recipe.num_virtual_tokens
            own += f" less the adapter's {recipe.num_virtual_tokens} virtual tokens"
        if context is not None and recipe.data.max_length > context:
            raise ConfigError(
                f"data.max_length: {recipe.data.max_length} is more than the {own}; "
                + (f"set it to {context} or less" if context > 1 else "set adapter.num_virtual_tokens lower")
            )
        if context is not None and recipe.evaluation.generation_prompts and recipe.evaluation.max_new_tokens >= context:
            raise ConfigError(
                f"evaluation.max_new_tokens: {recipe.evaluation.max_new_tokens} leave no room for a prompt in the "
                f"{own}; set it lower, or evaluation.generation_prompts to 0"
            )


# --- model → objective → optimizer ----------------------------------------------------------------------------------


def _prepare(run: RunFolder, plan: Plan, progress: Progress, stop: StopSignal, drift: list[str] | None) -> Session:
    """Build model, objective, reference, optimizer and state; `drift` is not None when the run is resumed, and its
    newest good checkpoint is restored then.
    """
    recipe = plan.recipe
    seed_everything(recipe.training.seed)
    checkpoint = None
    if drift is not None:
        checkpoint = latest_valid_checkpoint(run.checkpoints, progress.note)
        if checkpoint is None:
            progress.note("no checkpoint was saved yet: starting from the beginning")
            run.rewind(-1, -1)

    objective = build_objective(recipe.method)
    reference, reference_seconds, loaded = _reference_and_model(run, plan, objective, checkpoint, progress, stop)
    _check_same_reference(run, reference)
    ceiling = cost.matmul_ceiling(loaded.device, loaded.precision.product_dtype)
    reset_peak_memory(loaded.device)
    loaded.neftune_noise_alpha = recipe.training.neftune_noise_alpha
    if recipe.training.gradient_checkpointing:
        check_checkpointing(loaded)
        enable_checkpointing(loaded.model)
    sampler = _build_sampler(recipe, loaded.model, plan.loader.num_steps)
    optimizer = build_optimizer(
        loaded.named_parameters(),
        recipe.optimizer,
        loaded.device.type,
        roles=ParameterRoles.of(loaded.model),
        seed=recipe.training.seed,
        learning_rate_scales=learning_rate_scales(loaded.model, recipe.adapter),
    )
    if note := optimizer_note(recipe.optimizer):
        progress.note(note)
    scaler = torch.amp.GradScaler(loaded.device.type) if loaded.precision.needs_scaler else None
    updates = Updates(
        optimizer,
        releases=recipe.training.gradient_release,
        rounding_seed=None if recipe.training.stochastic_rounding is False else recipe.training.seed,
        sampler=sampler,
    )
    state = TrainState(loaded, optimizer, scaler, updates=updates)
    if checkpoint is not None:
        restore_checkpoint(checkpoint, state)
        run.rewind(state.step, state.evaluation.last_step)
        progress.note(f"resuming after step {state.step}")

    if drift is not None:
        resumes = [*run.record()["resumes"], {"time": now(), "step": state.step, "drift": drift}]
        run.update(resumes=resumes)
    run.update(data=plan.data.record(), model=_describe(recipe, loaded))
    return Session(
        run=run,
        plan=plan,
        state=state,
        objective=objective,
        reference=reference,
        reference_seconds=reference_seconds,
        prompts=_generation_prompts(plan, loaded, progress),
        trackers=build_trackers(recipe.tracking.trackers, recipe.tracking.project, run.path, recipe.resolved()),
        shape=_shape(loaded),
        matmul_ceiling=ceiling,
        meter=cost.ThroughputMeter(),
        progress=progress,
        stop=stop,
    )


def _build_sampler(recipe: Recipe, model: Any, num_steps: int) -> LayerSampler | None:
    """Of LISA and BAdam; None where all that can train always does. `model` may be a skeleton."""
    if not isinstance(recipe.optimizer, LISAConfig | BAdamConfig):
        return None
    try:
        _, layers = find_blocks(model)
    except ConfigError:
        raise ConfigError(
            f"optimizer.name: {recipe.optimizer.name} trains layers in turn, and {type(model).__name__} has no list of "
            "them; use adamw"
        ) from None
    return build_sampler(recipe.optimizer, model, list(layers), num_steps=num_steps, seed=recipe.training.seed)


def _reference_and_model(
    run: RunFolder, plan: Plan, objective: Objective, checkpoint: Path | None, progress: Progress, stop: StopSignal
) -> tuple[dict[str, np.ndarray], float, LoadedModel]:
    """Reference log-probabilities by data set name, the seconds they took, and the model to train.

    Never two models in memory at once.
    """
    recipe, loaded = plan.recipe, None
    reference: dict[str, np.ndarray] = {}
    seconds = 0.0
    if objective.needs_reference and isinstance(recipe.method, DPOConfig):
        place = recipe.method.reference
        if place is not None:
            loaded = _settle(load_model(recipe.model.at(place)), plan, progress)
            _check_same_tokens(recipe, loaded)
        else:  # the trained model with its adapter switched off, else the one it starts as
            loaded = _load_trained(plan, checkpoint if recipe.reference_is_below else None, progress)
        began = time.perf_counter()
        wanted = _records_needing_a_reference(plan)
        found = reference_logprobs(
            loaded,
            list(wanted.values()),
            progress,
            stop,
            lambda size: record_smaller_portion(run, phase="reference", step=0, records_per_batch=size),
            with_adapter=place is not None,
        )
        reference = dict(zip(wanted, found, strict=True))
        seconds = time.perf_counter() - began
        if place is not None or (checkpoint is not None and not recipe.reference_is_below):
            loaded = None
    if loaded is None:
        loaded = _load_trained(plan, checkpoint, progress)
    return reference, seconds, loaded


def _records_needing_a_reference(plan: Plan) -> dict[str, tuple[Dataset, np.ndarray]]:
    """By data set name: what is trained on (a run may be shorter than an epoch), and what is evaluated."""
    data, seed, samples = plan.data, plan.recipe.training.seed, plan.recipe.evaluation.eval_samples
    steps = [plan.loader.indices(step) for step in range(plan.loader.num_steps)]
    trained = np.unique(np.concatenate([*steps, fixed_sample(len(data.train), samples, seed)]))
    wanted = {"train": (data.train, trained)}
    if data.eval is not None:
        wanted["eval"] = (data.eval, fixed_sample(len(data.eval), samples, seed))
    return wanted


def _generation_prompts(plan: Plan, loaded: LoadedModel, progress: Progress) -> list[GenerationPrompt]:
    config, context = plan.recipe.evaluation, loaded.context_length
    room = None if context is None else context - config.max_new_tokens
    dataset, seed = plan.data.eval or plan.data.train, plan.recipe.training.seed
    prompts = generation_prompts(dataset, loaded.tokenizer, config.generation_prompts, seed, room)
    if len(prompts) < min(config.generation_prompts, len(dataset)):
        progress.note(f"only {len(prompts)} prompts leave room for {config.max_new_tokens} new tokens")
    return prompts


def _check_same_tokens(recipe: Recipe, reference: LoadedModel) -> None:
    if load_tokenizer(recipe.model).get_vocab() != reference.tokenizer.get_vocab():
        raise ConfigError(
            f"method.reference: {reference.source} and {recipe.model.name} have different tokenizers, so their "
            "log-probabilities cannot be compared; use a reference with the model's own tokenizer"
        )


def _load_trained(plan: Plan, checkpoint: Path | None, progress: Progress) -> LoadedModel:
    """The model to train, as it starts or as `checkpoint` left it, with the recipe's adapter."""
    recipe = plan.recipe
    if checkpoint is not None:
        loaded = load_model(recipe.model.at(str(checkpoint)), adapters="keep")
    else:
        loaded = load_model(recipe.model, adapters="fold")
    if recipe.adapter is not None and loaded.adapter is None:  # of partial tuning, a checkpoint is a whole model
        attach_adapter(loaded, recipe.adapter, recipe.training.seed)
    return _settle(loaded, plan, progress)


def _shape(loaded: LoadedModel) -> cost.ModelShape:
    """Of the model; what virtual tokens are computed from learns, so that a gradient passes every block."""
    shape = cost.ModelShape.of(loaded.model)
    return shape if loaded.prompt_encoder is None else replace(shape, embeddings_trained=True)


def _settle(loaded: LoadedModel, plan: Plan, progress: Progress) -> LoadedModel:
    """Choose how `loaded` computes, and say what it is."""
    config = plan.recipe.model
    choose_layout(loaded, config.layout, plan.data.longest, config.kernels)
    if loaded.layout == "padded":
        rows = f"padded rows ({loaded.layout_reason})"
    elif loaded.shortcuts.fused_blocks:
        rows = "packed rows, fused blocks"
    else:
        rows = f"packed rows, its own blocks ({loaded.blocks_reason})"
    part = "" if loaded.adapter is None else f" ({loaded.num_trainable_parameters / 1e6:.2g} M of them trained)"
    progress.note(
        f"model: {loaded.source}, {loaded.num_parameters / 1e6:.1f} M parameters{part}, "
        f"{loaded.device.type}, {loaded.precision.name}, {rows}"
    )
    return loaded


def _describe(recipe: Recipe, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "source": recipe.model.name,
        "architecture": type(loaded.model).__name__,
        "parameters": loaded.num_parameters,
        "trainable_parameters": loaded.num_trainable_parameters,
        "device": str(loaded.device),
        "precision": loaded.precision.name,
        "layout": loaded.layout,
        "layout_reason": loaded.layout_reason,
        "blocks": "fused" if loaded.shortcuts.fused_blocks else "own modules",
        "blocks_reason": loaded.blocks_reason,
    }


def _fingerprints(plan: Plan) -> dict[str, Any]:
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
    before, current = run.record().get("fingerprints", {}), _fingerprints(plan)
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


def _check_same_reference(run: RunFolder, reference: dict[str, np.ndarray]) -> None:
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


# --- the run record -------------------------------------------------------------------------------------------------


@contextmanager
def _recorded(run: RunFolder, stop: StopSignal) -> Iterator[None]:
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
def _advised(run: RunFolder, plan: Plan, target: Target) -> Iterator[None]:
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


def _record_cost(session: Session) -> None:
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
