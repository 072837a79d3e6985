"""Twenty steps of every optimizer against a float64 transcription of its paper (papers.py; sgd, adam and adamw:
test_optimizers.py)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import nn

from tests.optim import papers
from tunelab.config.optimizers import (
    AdafactorConfig,
    AdagradConfig,
    AdamMiniConfig,
    AdamW8bitConfig,
    AdamWConfig,
    ApolloConfig,
    ApolloMiniConfig,
    CAMEConfig,
    FiraConfig,
    GaLoreConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    RMSpropConfig,
    ScheduleFreeAdamWConfig,
    SM3Config,
)
from tunelab.optim import ParameterRoles, build_optimizer, to_evaluation, to_training
from tunelab.optim.low_rank import gaussian_projection

NUM_STEPS = 20
SHAPES = {"wte.weight": (8, 4), "tall.weight": (7, 4), "wide.weight": (4, 7), "bias": (5,)}
ROLES = ParameterRoles(embeddings=frozenset({"wte.weight"}))
DECAY = 0.1

ELEMENTWISE: dict[str, tuple[OptimizerConfig, Callable[..., papers.Update]]] = {
    "rmsprop": (RMSpropConfig(learning_rate=1e-3, weight_decay=DECAY), papers.rmsprop),
    "rmsprop, centered, momentum": (
        RMSpropConfig(learning_rate=1e-3, weight_decay=DECAY, centered=True, momentum=0.9, alpha=0.9),
        papers.rmsprop,
    ),
    "adagrad": (AdagradConfig(learning_rate=1e-2, weight_decay=DECAY), papers.adagrad),
    "adagrad, started": (AdagradConfig(learning_rate=1e-2, initial_accumulator_value=0.5), papers.adagrad),
    "lion": (LionConfig(learning_rate=1e-3, weight_decay=DECAY), papers.lion),
    "adafactor": (AdafactorConfig(learning_rate=1e-3, weight_decay=DECAY), papers.adafactor),
    "adafactor, relative": (
        AdafactorConfig(learning_rate=1e-2, weight_decay=DECAY, scale_parameter=True, clip_threshold=0.7),
        papers.adafactor,
    ),
    "sm3": (SM3Config(learning_rate=1e-2, weight_decay=DECAY), papers.sm3),
    "sm3 without momentum": (SM3Config(learning_rate=1e-2, momentum=0.0), papers.sm3),
    "came": (CAMEConfig(learning_rate=1e-4, weight_decay=DECAY), papers.came),
}


def gradients(name: str) -> list[np.ndarray]:
    """Of very unequal sizes; in every third, one row is 0."""
    generator, shape = np.random.default_rng(list(SHAPES).index(name)), SHAPES[name]
    found = [generator.standard_normal(shape) * 10.0 ** generator.integers(-3, 2) for _ in range(NUM_STEPS)]
    for gradient in found[::3]:
        gradient[1] = 0.0
    return found


def starts() -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(7).standard_normal(shape) for name, shape in SHAPES.items()}


def moved(
    config: OptimizerConfig, dtype: torch.dtype = torch.float64, roles: ParameterRoles = ROLES, seed: int = 3
) -> tuple[dict[str, np.ndarray], torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """Every parameter after the steps, and what moved them."""
    parameters = {name: nn.Parameter(torch.tensor(value, dtype=dtype)) for name, value in starts().items()}
    optimizer = build_optimizer(parameters.items(), config, "cpu", roles=roles, seed=seed)
    to_training(optimizer)
    pulls = {name: gradients(name) for name in SHAPES}
    for step in range(NUM_STEPS):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(pulls[name][step], dtype=dtype)
        optimizer.step()
    return (
        {name: parameter.detach().double().numpy().copy() for name, parameter in parameters.items()},
        optimizer,
        parameters,
    )


def transcribed(name: str, update: papers.Update, state: papers.State | None = None) -> np.ndarray:
    theta, state = starts()[name], {} if state is None else state
    for step, gradient in enumerate(gradients(name), start=1):
        theta = update(theta, gradient, step, state)
    return theta


def decay_of(config: OptimizerConfig, name: str) -> float:
    return 0.0 if name == "bias" else config.weight_decay


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ELEMENTWISE)
def test_library_optimizers(case: str) -> None:
    config, transcription = ELEMENTWISE[case]
    found, _, _ = moved(config)
    for name in SHAPES:
        assert_close(found[name], transcribed(name, transcription(config, decay_of(config, name))))


BLOCKS: dict[str, Iterable[tuple]] = {
    "wte.weight": [np.index_exp[token] for token in range(8)],
    "tall.weight": [np.index_exp[0:2], np.index_exp[2:4], *(np.index_exp[row] for row in (4, 5, 6))],
    "wide.weight": [np.index_exp[:, 0:3], np.index_exp[:, 3:6], np.index_exp[:, 6]],
    "bias": [np.index_exp[:]],
}
"""By hand: of `tall`, (out, in), four outputs are queries and keys in heads of two; of `wide`, (in, out), six in heads
of three."""


def test_adam_mini() -> None:
    config = AdamMiniConfig(learning_rate=1e-3, weight_decay=DECAY)
    heads = {"tall.weight": (4, 2), "wide.weight": (6, 3)}
    found, optimizer, parameters = moved(
        config, roles=ParameterRoles(frozenset({"wte.weight"}), frozenset({"wide.weight"}), heads)
    )
    for name in SHAPES:
        update = papers.adam_mini(config, decay_of(config, name), list(BLOCKS[name]))
        assert_close(found[name], transcribed(name, update))
        assert optimizer.state[parameters[name]]["exp_avg_sq"].numel() == len(list(BLOCKS[name]))


def test_schedule_free() -> None:
    config = ScheduleFreeAdamWConfig(learning_rate=1e-2, weight_decay=DECAY)
    at_y, optimizer, parameters = moved(config)
    to_evaluation(optimizer)
    for name, parameter in parameters.items():
        state: papers.State = {}
        assert_close(at_y[name], transcribed(name, papers.schedule_free(config, decay_of(config, name)), state))
        assert_close(parameter.detach().numpy(), state["x"])
    to_training(optimizer)
    for name, parameter in parameters.items():
        assert np.array_equal(parameter.detach().numpy(), at_y[name])


def singular_directions(rank: int, gap: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Of the gradients at steps 1, gap + 1, 2·gap + 1, …: eigenvectors of GᵀG, largest first.

    A direction's sign is arbitrary, and GaLore's moments outlive the directions; so the signs are LAPACK's.
    """
    found: dict[int, np.ndarray] = {}

    def projection(g: np.ndarray, t: int) -> np.ndarray:
        if (t - 1) % gap == 0:
            directions = np.linalg.eigh(g.T @ g).eigenvectors[:, ::-1].T
            signs = np.sign((directions * torch.linalg.svd(torch.tensor(g), full_matrices=False).Vh.numpy()).sum(1))
            found[0] = (directions * signs[:, None])[:rank]
        return found[0]

    return projection


@pytest.mark.parametrize(
    "config",
    [
        GaLoreConfig(learning_rate=1e-2, weight_decay=DECAY, rank=2, update_proj_gap=7),
        FiraConfig(learning_rate=1e-2, weight_decay=DECAY, rank=2, update_proj_gap=7),
        GaLoreConfig(learning_rate=1e-2, rank=64, scale=1.0),
    ],
    ids=lambda config: f"{config.name}, rank {config.rank}",
)
def test_projections_by_singular_vectors(config: GaLoreConfig | FiraConfig) -> None:
    found, _, _ = moved(config)
    for name in SHAPES:
        if name in ("tall.weight", "wide.weight"):
            projection = singular_directions(config.rank, config.update_proj_gap)
            update = papers.low_rank(config, decay_of(config, name), projection)
        else:
            update = papers.adamw(config, decay_of(config, name))
        assert_close(found[name], transcribed(name, update), 1e-8)


@pytest.mark.parametrize(
    "config",
    [
        ApolloConfig(learning_rate=1e-2, weight_decay=DECAY, rank=2, update_proj_gap=7, scale=2.0),
        ApolloMiniConfig(learning_rate=1e-3, weight_decay=DECAY, update_proj_gap=7),
    ],
    ids=lambda config: config.name,
)
def test_random_projections(config: ApolloConfig) -> None:
    """The projection is a function of seed, CRC-32 of the name, and number of the projection; it is read from there."""
    found, _, _ = moved(config, seed=3)
    for name in ("tall.weight", "wide.weight"):

        def projection(g: np.ndarray, t: int, name: str = name) -> np.ndarray:
            key = (3, zlib.crc32(name.encode()), (t - 1) // config.update_proj_gap)
            return gaussian_projection(config.rank, torch.tensor(g), key).numpy()

        update = papers.low_rank(config, decay_of(config, name), projection)
        assert_close(found[name], transcribed(name, update), 1e-8)
    for name in ("wte.weight", "bias"):
        assert_close(found[name], transcribed(name, papers.adamw(config, decay_of(config, name))))


def test_gaussian_projections_keep_lengths_and_differ_by_key() -> None:
    """‖Px‖² has mean ‖x‖²: over 4000 draws of rank 2 its relative standard error is √(2/2/4000) = 1.6%."""
    x = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projections = [gaussian_projection(2, x, (0, 1, number)) for number in range(4000)]
    mean = torch.stack([(x @ p.t()).square().sum() for p in projections]).mean()
    assert mean.item() == pytest.approx(x.square().sum().item(), rel=0.06)
    keys = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    assert len({gaussian_projection(2, x, key)[0, 0].item() for key in keys}) == 4
    assert torch.equal(gaussian_projection(2, x, keys[0]), projections[0])


def test_muon() -> None:
    """torch orthogonalises in bf16, so that matrices agree to about a hundredth of what they moved."""
    config = MuonConfig(learning_rate=1e-2, weight_decay=DECAY)
    found, _, _ = moved(config)
    for name in ("tall.weight", "wide.weight"):
        expected = transcribed(name, papers.muon(config, DECAY))
        difference = np.linalg.norm(found[name] - expected)
        assert difference < 0.02 * np.linalg.norm(expected - starts()[name]), name
    for name in ("wte.weight", "bias"):
        assert_close(found[name], transcribed(name, papers.adamw(config, decay_of(config, name))))


@pytest.mark.parametrize("embeddings_32bit", [True, False])
def test_adamw_8bit(embeddings_32bit: bool) -> None:
    """A matrix of 20 blocks. A code may fall to either side of a tie, so they agree to a thousandth of the way moved;
    to AdamW, which they should differ from, they agree ten times worse.
    """
    from bitsandbytes.functional import create_dynamic_map

    config = AdamW8bitConfig(learning_rate=1e-2, weight_decay=DECAY, embeddings_32bit=embeddings_32bit)
    start = np.random.default_rng(0).standard_normal((64, 80))
    pulls = [np.random.default_rng(step).standard_normal(start.shape) for step in range(NUM_STEPS)]
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = build_optimizer([("wte.weight", parameter)], config, "cpu", roles=ROLES)
    for pull in pulls:
        parameter.grad = torch.tensor(pull, dtype=torch.float32)
        optimizer.step()

    tables = [np.array(create_dynamic_map(signed=signed).tolist()) for signed in (True, False)]
    ends = []
    for update in (papers.adamw_8bit(config, DECAY, *tables), papers.adamw(config, DECAY)):
        theta, state = start, {}
        for step, pull in enumerate(pulls, start=1):
            theta = update(theta, pull, step, state)
        ends.append(np.linalg.norm(parameter.detach().numpy() - theta) / np.linalg.norm(theta - start))
    quantised, exact = ends
    assert (exact < 1e-4) if embeddings_32bit else (quantised < 2e-3 and exact > 10 * quantised)
    assert optimizer.state[parameter]["state1"].dtype == (torch.float32 if embeddings_32bit else torch.uint8)


def test_all_of_them_differ() -> None:
    """Guards the suite: a builder that forgot what makes its method would make two ends equal."""
    configs = [config for config, _ in ELEMENTWISE.values()]
    configs += [AdamMiniConfig(), MuonConfig(), GaLoreConfig(rank=2), FiraConfig(rank=2), ApolloConfig(rank=2)]
    configs += [ApolloMiniConfig(), ScheduleFreeAdamWConfig(), AdamWConfig()]
    ends = [moved(config.model_copy(update={"learning_rate": 1e-3}))[0]["tall.weight"].sum() for config in configs]
    assert len(set(ends)) == len(configs)
