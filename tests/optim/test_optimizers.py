"""Every optimizer against its update equations, written out in float64 numpy; groups; determinism; state."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from tunelab.config import AdamConfig, AdamWConfig, OptimizerConfig, SGDConfig
from tunelab.optim import build_optimizer, parameter_groups

NUM_STEPS = 20
CONFIGS: dict[str, OptimizerConfig] = {
    "sgd": SGDConfig(learning_rate=0.1, weight_decay=0.01),
    "momentum": SGDConfig(learning_rate=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": SGDConfig(learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": AdamConfig(learning_rate=0.1, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    "adamw": AdamWConfig(learning_rate=0.1, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
}
Update = Callable[[np.ndarray, np.ndarray, int, dict[str, np.ndarray]], np.ndarray]


def sgd(config: SGDConfig, decay: float) -> Update:
    """g ← g + λθ; m ← μm + g (m = g in the first step); θ ← θ - α m, or θ - α (g + μm) for Nesterov's."""

    def update(theta: np.ndarray, gradient: np.ndarray, step: int, state: dict[str, np.ndarray]) -> np.ndarray:
        gradient = gradient + decay * theta
        state["m"] = gradient if step == 1 else config.momentum * state["m"] + gradient
        direction = gradient + config.momentum * state["m"] if config.nesterov else state["m"]
        return theta - config.learning_rate * direction

    return update


def adam(config: AdamConfig, decay: float) -> Update:
    """Kingma & Ba 2015, algorithm 1. Decay λ joins the gradient (adam), or the update as -αλθ (adamw:
    Loshchilov & Hutter 2019, algorithm 2, with the schedule multiplier in α as torch has it)."""
    decoupled = isinstance(config, AdamWConfig)
    beta1, beta2 = config.betas

    def update(theta: np.ndarray, gradient: np.ndarray, step: int, state: dict[str, np.ndarray]) -> np.ndarray:
        shrink = config.learning_rate * decay * theta if decoupled else 0.0
        gradient = gradient if decoupled else gradient + decay * theta
        state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * gradient
        state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * gradient**2
        m_hat, v_hat = state["m"] / (1 - beta1**step), state["v"] / (1 - beta2**step)
        return theta - shrink - config.learning_rate * m_hat / (np.sqrt(v_hat) + config.eps)

    return update


def make_update(config: OptimizerConfig, decay: float) -> Update:
    return sgd(config, decay) if isinstance(config, SGDConfig) else adam(config, decay)


def gradients(shape: tuple[int, ...], seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) * 10.0 ** generator.integers(-3, 2) for _ in range(NUM_STEPS)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twenty_steps_follow_the_equations(name: str, dtype: torch.dtype) -> None:
    """A matrix, which decays, and a vector, which does not, through gradients of very unequal sizes."""
    config = CONFIGS[name]
    shapes = {"weight": (3, 5), "bias": (5,)}
    start = {key: np.random.default_rng(7).standard_normal(shape) for key, shape in shapes.items()}
    parameters = {key: nn.Parameter(torch.tensor(value, dtype=dtype)) for key, value in start.items()}
    optimizer = build_optimizer(parameters.items(), config, "cpu")
    pulls = {key: gradients(shape, seed) for seed, (key, shape) in enumerate(shapes.items())}
    for step in range(NUM_STEPS):
        for key, parameter in parameters.items():
            parameter.grad = torch.tensor(pulls[key][step], dtype=dtype)
        optimizer.step()

    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for key, theta in start.items():
        update, state = make_update(config, config.weight_decay if key == "weight" else 0.0), {}
        for step in range(NUM_STEPS):
            theta = update(theta, pulls[key][step], step + 1, state)
        np.testing.assert_allclose(parameters[key].detach().numpy(), theta, rtol=tolerance, atol=tolerance)


def test_the_five_optimizers_differ() -> None:
    """Guards the parity test: a builder that forgot momentum, nesterov or decoupling would make two ends equal."""
    ends = []
    for config in CONFIGS.values():
        parameter = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        optimizer = build_optimizer([("w", parameter)], config, "cpu")
        for gradient in gradients((2, 2), 0):
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        ends.append(parameter.detach().sum().item())
    assert len(set(ends)) == len(CONFIGS)


class Tied(nn.Module):
    """A language model in miniature: tied embeddings, a norm, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_groups_by_shape_frozen_left_out_tied_once(remove_duplicate: bool) -> None:
    model = Tied()
    named = model.named_parameters(remove_duplicate=remove_duplicate)
    decayed, exempt = parameter_groups(named, weight_decay=0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.embedding.weight), id(model.linear.weight)]
    assert [id(p) for p in exempt["params"]] == [id(model.norm.weight), id(model.norm.bias), id(model.linear.bias)]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)


def test_a_group_without_parameters_is_not_made() -> None:
    (only,) = parameter_groups(nn.Linear(3, 3, bias=False).named_parameters(), weight_decay=0.1)
    assert only["weight_decay"] == 0.1


def test_tied_weights_move_once() -> None:
    """SGD, α = 1, gradient 1: the shared tensor moves by 1, not by 2."""
    model = Tied()
    before = model.embedding.weight.detach().clone()
    named = model.named_parameters(remove_duplicate=False)
    optimizer = build_optimizer(named, SGDConfig(learning_rate=1.0), "cpu")
    model.embedding.weight.grad = torch.ones_like(before)
    optimizer.step()
    torch.testing.assert_close(model.head.weight.detach(), before - 1.0)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def fresh(config: OptimizerConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    return model, build_optimizer(model.named_parameters(), config, "cpu")


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_repeats_bit_for_bit(name: str) -> None:
    (one, first), (other, second) = fresh(CONFIGS[name]), fresh(CONFIGS[name])
    trained(one, first, range(10))
    trained(other, second, range(10))
    assert_equal_weights(one, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_state_continues_bit_for_bit(name: str) -> None:
    """10 steps = 4 steps, state_dict into a new optimizer over copied weights, 6 steps."""
    unbroken, optimizer = fresh(CONFIGS[name])
    trained(unbroken, optimizer, range(10))

    model, optimizer = fresh(CONFIGS[name])
    trained(model, optimizer, range(4))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    resumed, optimizer = fresh(CONFIGS[name])
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    trained(resumed, optimizer, range(4, 10))
    assert_equal_weights(unbroken, resumed)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_kernel_on_the_cpu(name: str) -> None:
    _, optimizer = fresh(CONFIGS[name])
    assert all(group["fused"] for group in optimizer.param_groups)


def test_a_device_without_fused_kernels_gets_torchs_choice() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2, device="meta").named_parameters(), AdamWConfig(), "meta")
    assert all(group["fused"] is None for group in optimizer.param_groups)
