"""A tiny model and whole training steps on it, for the tests of how updates reach the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models.small_models import as_loaded, small_gpt2, small_llama
from tunelab.config import SFTConfig
from tunelab.config.optimizers import OptimizerConfig
from tunelab.data import pack
from tunelab.models.engine import choose_layout
from tunelab.models.loaded import LoadedModel
from tunelab.objectives import build_objective
from tunelab.optim import ParameterRoles, Updates, build_optimizer
from tunelab.parallel import resolve_precision
from tunelab.training.state import TrainState
from tunelab.training.step import MicroBatch, train_step
from tunelab.types import Completion, Example, Metrics, Origin

MODELS = {
    "gpt2": lambda: small_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.02),
    "llama": lambda: small_llama(initializer_range=0.02),
    "tied llama": lambda: small_llama(tie_word_embeddings=True, initializer_range=0.02),
}


def small_loaded(name: str = "gpt2", precision: str = "float32", **layout: Any) -> LoadedModel:
    loaded = as_loaded(MODELS[name]())
    loaded.precision = resolve_precision(precision, loaded.device)
    loaded.model.to(loaded.precision.weights_dtype)
    choose_layout(loaded, layout.pop("layout", "packed"), 128, **layout)
    return loaded


def small_state(loaded: LoadedModel, config: OptimizerConfig, **updates: Any) -> TrainState:
    optimizer = build_optimizer(loaded.named_parameters(), config, "cpu", roles=ParameterRoles.of(loaded.model), seed=0)
    return TrainState(loaded, optimizer, None, updates=Updates(optimizer, **updates))


def small_batch(seed: int = 0) -> MicroBatch:
    """Three sequences of 20, 5 and 9 tokens behind prompts of 3."""
    draw = np.random.default_rng(seed)
    examples = []
    for line, length in enumerate((20, 5, 9), 1):
        ids = draw.integers(0, 1000, 3 + length).astype(np.int32)
        completion = Completion(ids[3:], np.ones(length, dtype=bool))
        examples.append(Example(ids[:3], (completion,), Origin("test", line)))
    return MicroBatch(pack(examples, [0, 1, 2]))


def one_step(state: TrainState, learning_rate: float = 1e-3, max_grad_norm: float | None = None) -> Metrics:
    """A step on data of its own."""
    batch = small_batch(state.step)
    objective = build_objective(SFTConfig())
    metrics = train_step(state, objective, [batch], learning_rate=learning_rate, max_grad_norm=max_grad_norm)
    state.counters.step += 1
    return metrics


def weights(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in loaded.named_parameters()}


def check_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
