"""What happens in a run's loop: the step, the evaluation, the checkpoint, each a function of the session.

`train.py` builds the session and hands these to the loop as hooks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tunelab import cost
from tunelab.config import Recipe
from tunelab.data import Dataset, GenerationPrompt, Loader, fixed_sample, pack, split_by_tokens, stop_strings
from tunelab.evaluation.heldout import evaluate_objective
from tunelab.manifest import checkpoint_name
from tunelab.models.generation import GenerationSettings, generate
from tunelab.objectives import Objective
from tunelab.optim import Schedule
from tunelab.parallel import peak_memory_bytes, resolve_device
from tunelab.progress import Progress
from tunelab.runs import RunFolder
from tunelab.training.checkpoint import point_best, prune_checkpoints, save_checkpoint
from tunelab.training.loop import Hook, StopRequested, run_loop
from tunelab.training.signals import StopSignal
from tunelab.training.state import TrainState
from tunelab.training.step import MicroBatch, train_step
from tunelab.training.trackers import Tracker
from tunelab.types import Metrics

MICRO_BATCH_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""Default of `training.max_tokens_per_micro_batch`: enough rows to keep the matrix products near the device's best, and
no more, because activations grow with them."""

EVALUATIONS_PER_RUN = 5
"""Default of `evaluation.eval_steps`: this many a run, beside the one before the first step."""


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is measured with."""

    train: Dataset
    eval: Dataset | None

    @property
    def longest(self) -> int:
        """Tokens of the longest single sequence."""
        return max(self.train.longest, self.eval.longest if self.eval else 0)

    @cached_property
    def overlap(self) -> int:
        """Eval records that are trained on as well, token for token: what they measure is memory."""
        return self.eval.overlap(self.train) if self.eval else 0

    def record(self) -> dict[str, Any]:
        """`data` of run.json."""
        return {
            "train": self.train.summary.to_json(),
            "eval": self.eval.summary.to_json() if self.eval else None,
            "eval_records_also_trained_on": self.overlap,
        }


@dataclass(frozen=True)
class Plan:
    """A recipe checked against machine, model and data: what will be done, before any weights are read."""

    recipe: Recipe
    data: TrainingData
    loader: Loader
    schedule: Schedule

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """Records of each micro-batch of optimizer step `step`: at most per_device_train_batch_size of them, and split
        again where they have more tokens than fit.
        """
        training, lengths = self.recipe.training, self.data.train.num_tokens
        device = resolve_device(self.recipe.model.device).type
        budget = training.max_tokens_per_micro_batch or MICRO_BATCH_TOKENS[device]
        return [
            part
            for indices in self.loader.micro_batches(step, training.per_device_train_batch_size)
            for part in split_by_tokens(indices, lengths[indices], budget)
        ]


@dataclass
class Session:
    """Everything one process needs to carry a plan out: the recipe's objects, built."""

    run: RunFolder
    plan: Plan
    state: TrainState
    objective: Objective
    reference: dict[str, np.ndarray]
    reference_seconds: float
    prompts: list[GenerationPrompt]
    trackers: list[Tracker]
    shape: cost.ModelShape
    matmul_ceiling: float
    meter: cost.ThroughputMeter
    progress: Progress
    stop: StopSignal


def run_session(session: Session) -> bool:
    """The loop with its hooks. True if the run is finished, False if it was stopped and saved."""
    recipe, state, num_steps = session.plan.recipe, session.state, session.plan.loader.num_steps
    eval_steps = recipe.evaluation.eval_steps or max(1, -(-num_steps // EVALUATIONS_PER_RUN))
    session.progress.start("training", num_steps, state.step)
    try:
        finished = run_loop(
            state,
            num_steps=num_steps,
            step=lambda state: _step(session, recipe.optimizer.learning_rate * session.plan.schedule(state.step)),
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
    recipe, state, counters = session.plan.recipe, session.state, session.state.counters
    micro_batches = [
        build_micro_batch(session.plan.data.train, indices, session.reference.get("train"))
        for indices in session.plan.micro_batches(state.step)
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
        counters.floor_flops += cost.floor_flops(session.shape, batch)
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


def build_micro_batch(dataset: Dataset, indices: np.ndarray, reference: np.ndarray | None) -> MicroBatch:
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
    config = session.plan.recipe.evaluation
    evaluation.note(state.step, loss, config.early_stopping_threshold)
    patience = config.early_stopping_patience
    if patience is not None and evaluation.without_improvement >= patience:
        state.stop_early = True
        session.progress.note(f"stopping early: no better eval/loss in {patience} evaluations")


def _measure(session: Session) -> Metrics:
    config, seed = session.plan.recipe.evaluation, session.plan.recipe.training.seed
    metrics: Metrics = {}
    for prefix, name, dataset in (
        ("eval", "eval", session.plan.data.eval),
        ("eval_train", "train", session.plan.data.train),
    ):
        if dataset is None:
            continue
        task = f"evaluation ({name} data)"
        indices = fixed_sample(len(dataset), config.eval_samples, seed)
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
    config = session.plan.recipe.evaluation
    if not session.prompts:
        return []
    settings = GenerationSettings(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop=stop_strings(session.plan.data.train.summary.session_render),
        seed=session.plan.recipe.training.seed,
    )
    return [answer.text for answer in generate(session.state.loaded, [p.ids for p in session.prompts], settings)]


def _log(session: Session, phase: str, metrics: Metrics) -> None:
    session.run.log_metrics(session.state.step, phase, metrics)
    for tracker in session.trackers:
        tracker.log(session.state.step, metrics)


def _save_if_due(session: Session) -> None:
    step = session.state.step
    if step and (step % session.plan.recipe.training.save_steps == 0 or session.state.evaluation.best_step == step):
        _save(session)


def _save(session: Session) -> None:
    """A checkpoint of this step, the `best` link, and only then the removal of old ones."""
    run, state = session.run, session.state
    best = state.evaluation.best_step
    with session.meter.pause(), _timed(state, "checkpoint"):
        path = save_checkpoint(run.checkpoints, state, run.record()["fingerprints"])
        best_path = run.checkpoints / checkpoint_name(best) if best is not None else None
        if best_path is not None and best_path.exists():
            point_best(run.path / "best", best_path)
        prune_checkpoints(run.checkpoints, session.plan.recipe.training.save_total_limit, path, best_path)


@contextmanager
def _timed(state: TrainState, phase: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        state.counters.add_seconds(phase, time.perf_counter() - began)
