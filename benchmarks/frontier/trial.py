"""One run of one arm, by the engine's own functions: train, count the bytes, measure the held-out loss."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.frontier.arms import Arm
from benchmarks.frontier.base import HELD_OUT, SEED, make_micro_batches, prepare_texts, read_answers, read_texts
from tunelab.config import LoRAConfig, ModelConfig, SFTConfig
from tunelab.config.optimizers import BAdamConfig, LISAConfig, OptimizerConfig, ScheduleFreeAdamWConfig
from tunelab.config.schedules import ConstantSchedule, LinearSchedule
from tunelab.data import Dataset, Loader, fixed_sample
from tunelab.errors import DivergedError
from tunelab.evaluation.heldout import evaluate_objective
from tunelab.models.adapters import attach_adapter
from tunelab.models.adapters.partial import find_blocks
from tunelab.models.engine import choose_layout
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import load_model, load_tokenizer
from tunelab.objectives import build_objective
from tunelab.optim import ParameterRoles, build_optimizer, build_schedule
from tunelab.optim.library import to_evaluation
from tunelab.optim.sampling import build_sampler
from tunelab.optim.updates import Updates
from tunelab.parallel import deterministic, keep_freed_memory, resolve_precision
from tunelab.training.state import TrainState
from tunelab.training.step import train_step


@dataclass(frozen=True)
class Task:
    """What every arm is trained on: for a seed the same records in the same order, `steps` times `records` of them.

    `kind`: the answers of helpful-base, or whole dialogues: the texts of pretraining, or chats.
    """

    name: str
    model: str
    kind: Literal["answers", "texts", "chats"]
    steps: int
    records: int
    max_length: int
    held_out: int
    warmup_ratio: float = 0.1


def run_trial(task: Task, arm: Arm, learning_rate: float, seed: int, work: Path) -> dict[str, Any]:
    """Held-out loss (in float32 products, of the weights as they are stored), bytes per parameter, seconds.

    A run that diverged, or whose loss is not finite, has the loss None.
    """
    keep_freed_memory()
    with deterministic():
        loaded = _load(task, arm, seed)
        data = _data(task.kind, task.model, task.max_length, work)
        section = {"weight_decay": 0.0, **arm.optimizer, "learning_rate": learning_rate}
        config: Any = TypeAdapter(OptimizerConfig).validate_python(section)
        state = _state(loaded, arm, config, task, seed)
        began = time.perf_counter()
        losses, memory = _train(state, arm, config, task, data, seed)
        seconds = time.perf_counter() - began
        loss = _held_out_loss(state, data, task.held_out) if len(losses) == task.steps else None
    tokens = sum(int(data.records.num_tokens[chosen].sum()) for chosen in _batches(task, data, seed))
    return {
        "task": task.name,
        "label": arm.label,
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": task.steps,
        "tokens": tokens,
        "loss": loss if loss is not None and np.isfinite(loss) else None,
        "train_losses": losses,
        "seconds": seconds,
        "bytes_per_parameter": memory,
        "parameters": loaded.num_parameters,
    }


def untrained_loss(task: Task, arm: Arm, work: Path) -> float:
    """What the held-out loss is before the first step."""
    loaded = _load(task, arm, 0)
    data = _data(task.kind, task.model, task.max_length, work)
    state = TrainState(loaded, torch.optim.SGD(loaded.model.parameters(), lr=0.0), None)
    return _held_out_loss(state, data, task.held_out)


def _load(task: Task, arm: Arm, seed: int) -> LoadedModel:
    loaded = load_model(ModelConfig(name=task.model, precision=arm.storage))
    if arm.adapter is not None:
        attach_adapter(loaded, LoRAConfig(**arm.adapter), seed)
    choose_layout(loaded, "auto", task.max_length)
    return loaded


def _state(loaded: LoadedModel, arm: Arm, config: Any, task: Task, seed: int) -> TrainState:
    """As `train.py` puts it together."""
    sampler = None
    if isinstance(config, LISAConfig | BAdamConfig):
        layers = find_blocks(loaded.model)[1]
        sampler = build_sampler(config, loaded.model, layers, num_steps=task.steps, seed=seed)
    optimizer = build_optimizer(
        loaded.named_parameters(), config, "cpu", roles=ParameterRoles.of(loaded.model), seed=seed
    )
    updates = Updates(optimizer, releases=arm.releases, rounding_seed=seed, sampler=sampler)
    return TrainState(loaded, optimizer, None, updates=updates)


def _train(
    state: TrainState, arm: Arm, config: Any, task: Task, data: _Data, seed: int
) -> tuple[list[float], dict[str, float]]:
    """Losses of the steps made (all of them unless it diverged), and bytes per parameter by part."""
    warmup = {"warmup_ratio": task.warmup_ratio}
    constant = isinstance(config, ScheduleFreeAdamWConfig)
    schedule = build_schedule(ConstantSchedule(**warmup) if constant else LinearSchedule(**warmup), task.steps)
    objective = build_objective(SFTConfig())
    losses: list[float] = []
    gradients, most_state = GradientMeter(state.loaded), 0
    for step, chosen in enumerate(_batches(task, data, seed)):
        try:
            metrics = train_step(
                state,
                objective,
                make_micro_batches(data.records, chosen),
                learning_rate=config.learning_rate * schedule(step),
                max_grad_norm=arm.max_grad_norm,
            )
        except DivergedError:
            break
        state.counters.step += 1
        losses.append(metrics["train/loss"])
        most_state = max(most_state, storage_bytes(_tensors(dict(state.optimizer.state))))
    gradients.remove()
    size = state.loaded.num_parameters
    return losses, {
        "weights": storage_bytes(p for _, p in state.loaded.named_parameters()) / size,
        "gradients": gradients.peak / size,
        "state": most_state / size,
    }


def _batches(task: Task, data: _Data, seed: int) -> list[np.ndarray]:
    loader = Loader(len(data.trainable), task.records, max_steps=task.steps, seed=seed)
    return [data.trainable[loader.indices(step)] for step in range(task.steps)]


# --- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """Its last `HELD_OUT` records are held out, the others `trainable`."""

    records: Dataset
    trainable: np.ndarray


@lru_cache(maxsize=2)
def _data(kind: str, model: str, max_length: int, work: Path) -> _Data:
    tokenizer = load_tokenizer(ModelConfig(name=model))
    if kind == "answers":
        dataset = read_answers(tokenizer, max_length)
    else:
        name = {"texts": "train.jsonl.gz", "chats": "chats.jsonl.gz"}[kind]
        dataset = read_texts(prepare_texts(work) / name, tokenizer, max_length)
    return _Data(dataset, np.arange(len(dataset) - HELD_OUT))


def _held_out_loss(state: TrainState, data: _Data, count: int) -> float:
    """Mean over the tokens of `count` held-out records, in float32 products."""
    loaded = state.loaded
    to_evaluation(state.optimizer)
    loaded.model.float()
    loaded.precision = resolve_precision("float32", loaded.device)
    records = fixed_sample(HELD_OUT, count, SEED) + len(data.trainable)
    return evaluate_objective(loaded, build_objective(SFTConfig()), data.records, records, None, batch_size=8)["loss"]


# --- bytes ----------------------------------------------------------------------------------------------------------


class GradientMeter:
    """The most bytes of gradients that exist at once, counted whenever one is finished.

    That of a tied output head is made first and waits for the embedding's outside of `.grad` (`TiedGradient`): it is
    counted from the beginning.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.parameters = [p for _, p in loaded.named_parameters() if p.requires_grad]
        head = loaded.model.get_output_embeddings().weight
        self._tied = head if head is loaded.model.get_input_embeddings().weight and head.requires_grad else None
        self.peak = 0
        self._hooks = [p.register_post_accumulate_grad_hook(self._count) for p in self.parameters]

    def _count(self, _: Tensor) -> None:
        waiting = self._tied is not None and self._tied.grad is None
        alive = storage_bytes(p.grad for p in self.parameters if p.grad is not None)
        if waiting:
            assert self._tied is not None
            alive += self._tied.numel() * self._tied.element_size()
        self.peak = max(self.peak, alive)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
