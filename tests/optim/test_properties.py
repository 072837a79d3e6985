"""What holds for every optimizer. A new one is a case in `cases.py`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models.small_models import as_loaded, small_gpt2
from tests.optim.cases import CASES, MODELS, build, give_gradients
from tunelab.config import SFTConfig
from tunelab.config.optimizers import OptimizerConfig
from tunelab.data import pack
from tunelab.objectives import build_objective
from tunelab.optim import to_evaluation, to_training
from tunelab.optim.footprint import state_bytes
from tunelab.optim.groups import ParameterRoles
from tunelab.optim.saving import pack_state, unpack_state
from tunelab.optim.single import SingleSteps
from tunelab.training.state import TrainState
from tunelab.training.step import MicroBatch, train_step
from tunelab.types import Completion, Example, Origin

torch.set_num_threads(1)

IN_FLOAT32 = frozenset({"adam_mini", "adamw_8bit", "adalomo", "quarter"})
"""Optimizers that keep no state in half precision (8-bit moments aside), whatever the weights are."""


@pytest.fixture(params=CASES)
def config(request: pytest.FixtureRequest) -> OptimizerConfig:
    return CASES[request.param]


def fresh(config: OptimizerConfig, name: str = "gpt2", dtype: torch.dtype = torch.float32) -> tuple:
    model = MODELS[name](n_layer=1) if name == "gpt2" else MODELS[name](num_hidden_layers=1)
    model = model.to(dtype)
    return model, build(model, config)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    parameters = dict(model.named_parameters())
    to_training(optimizer)
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()
    to_evaluation(optimizer)
    for parameter in parameters.values():
        parameter.grad = None


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_repeats_bit_for_bit(config: OptimizerConfig, dtype: torch.dtype) -> None:
    (one, first), (other, second) = fresh(config, dtype=dtype), fresh(config, dtype=dtype)
    advance(one, first, range(5))
    torch.rand(7)  # nothing may hang on the global generator
    advance(other, second, range(5))
    assert_equal_weights(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_bits_of_the_unbroken(
    config: OptimizerConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    """12 steps = 4 steps, evaluation, 8 steps = 4 steps, state through safetensors and JSON into a new optimizer, 8."""
    unbroken, optimizer = fresh(config, dtype=dtype)
    advance(unbroken, optimizer, range(12))

    evaluated, optimizer = fresh(config, dtype=dtype)
    advance(evaluated, optimizer, range(4))
    tensors, described = pack_state(optimizer)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "optimizer.json").write_text(json.dumps(described))
    weights = copy.deepcopy(evaluated.state_dict())
    advance(evaluated, optimizer, range(4, 12))
    assert_equal_weights(unbroken, evaluated)

    resumed, optimizer = fresh(config, dtype=dtype)
    resumed.load_state_dict(weights)
    described = json.loads((tmp_path / "optimizer.json").read_text())
    unpack_state(optimizer, load_file(tmp_path / "optimizer.safetensors"), described)
    advance(resumed, optimizer, range(4, 12))
    assert_equal_weights(unbroken, resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_state_has_the_bytes_of_the_formula(config: OptimizerConfig, name: str, dtype: torch.dtype) -> None:
    model, optimizer = fresh(config, name, dtype)
    give_gradients(dict(model.named_parameters()), 0)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    shapes = [(name, tuple(p.shape), p.element_size()) for name, p in model.named_parameters()]
    assert sum(tensor.nbytes for tensor in held) == state_bytes(config, shapes, ParameterRoles.of(model))


def test_state_dtypes_of_bf16_weights(config: OptimizerConfig) -> None:
    """The methods of other libraries keep their state in the weights' dtype; ours and 8-bit AdamW do not."""
    model, optimizer = fresh(config, dtype=torch.bfloat16)
    roles = ParameterRoles.of(model)
    give_gradients(dict(model.named_parameters()), 0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        dtypes = {
            value.dtype
            for key, value in optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor) and key not in ("step", "RMS")
        }
        projected = config.name in ("galore", "fira", "apollo", "apollo_mini")
        own = config.name in IN_FLOAT32 or (projected and roles.is_block_matrix(name, tuple(parameter.shape)))
        assert dtypes - {torch.uint8, torch.int8} <= {torch.float32 if own else torch.bfloat16}, name


def test_matrices_decay_and_vectors_do_not(config: OptimizerConfig) -> None:
    """Under a gradient of 0 nothing but weight decay moves a weight."""
    model, optimizer = fresh(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    to_evaluation(optimizer)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or config.weight_decay == 0.0:
            assert torch.equal(parameter, before[name]), name
        else:
            assert parameter.norm() < before[name].norm(), name


def test_a_group_learns_at_its_own_rate(config: OptimizerConfig) -> None:
    model, optimizer = fresh(config)
    before = copy.deepcopy(model)
    still, moving = optimizer.param_groups[0], optimizer.param_groups[1:]
    still["lr"] = 0.0
    give_gradients(dict(model.named_parameters()), 0)
    optimizer.step()
    old = dict(zip(model.parameters(), before.parameters(), strict=True))
    assert all(torch.equal(parameter, old[parameter]) for parameter in still["params"])
    assert not any(torch.equal(parameter, old[parameter]) for group in moving for parameter in group["params"])


def test_tied_embeddings_are_one_parameter(config: OptimizerConfig) -> None:
    model = small_gpt2(n_layer=1)
    named = list(model.named_parameters(remove_duplicate=False))
    optimizer = build(model, config)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(named) == len(held) + 1
    assert held.count(id(model.lm_head.weight)) == 1


def test_one_parameter_at_a_time_comes_to_the_same(config: OptimizerConfig) -> None:
    """What gradient release and stochastic rounding ask of an optimizer."""
    (together, first), (alone, second) = fresh(config), fresh(config)
    advance(together, first, range(3))
    singly = SingleSteps(second)
    parameters = dict(alone.named_parameters())
    for step in range(3):
        give_gradients(parameters, step)
        for parameter in reversed(parameters.values()):
            singly.step(parameter)
        singly.settle()
    to_evaluation(second)
    assert_equal_weights(together, alone)


def test_a_parameter_without_a_gradient_stays(config: OptimizerConfig) -> None:
    model, optimizer = fresh(config)
    parameters = dict(model.named_parameters())
    for step in range(2):
        give_gradients(parameters, step)
        parameters["transformer.h.0.mlp.c_fc.weight"].grad = None
        before = parameters["transformer.h.0.mlp.c_fc.weight"].detach().clone()
        optimizer.step()
    assert torch.equal(parameters["transformer.h.0.mlp.c_fc.weight"], before)


def test_it_trains_with_clipping_and_accumulation(config: OptimizerConfig) -> None:
    """Twelve steps on the same four records, two micro-batches each: the loss falls by a tenth at least."""
    model = small_gpt2(n_layer=1)
    state = TrainState(as_loaded(model), build(model, config), None)
    generator = np.random.default_rng(0)
    examples = [
        Example(
            generator.integers(1, 1024, 6, dtype=np.int32),
            (Completion(generator.integers(1, 1024, size, dtype=np.int32), np.ones(size, dtype=bool)),),
            Origin("test", number),
        )
        for number, size in enumerate((5, 9, 7, 3))
    ]
    batches = [MicroBatch(pack(examples[:1], [0])), MicroBatch(pack(examples[1:], [1, 2, 3]))]
    objective = build_objective(SFTConfig())
    losses = []
    for _ in range(12):
        metrics = train_step(state, objective, batches, learning_rate=config.learning_rate, max_grad_norm=1.0)
        state.counters.step += 1
        losses.append(metrics["train/loss"])
    assert losses[-1] < 0.9 * losses[0]
