"""Parity with the authors' own packages and with transformers, where such a package exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunelab.config.optimizers import (
    AdafactorConfig,
    ApolloConfig,
    ApolloMiniConfig,
    FiraConfig,
    GaLoreConfig,
    OptimizerConfig,
    ScheduleFreeAdamWConfig,
)
from tunelab.optim import build_optimizer, to_evaluation, to_training
from tunelab.optim.low_rank import gaussian_projection

NUM_STEPS = 20
SHAPES = {"tall.weight": (24, 8), "wide.weight": (8, 24)}


def fresh() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def pull(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 4 - 3)


def assert_same_ends(
    config: OptimizerConfig, build: Callable[[list[nn.Parameter]], Any], steps: int = NUM_STEPS
) -> None:
    ours, theirs = fresh(), fresh()
    optimizer, reference = build_optimizer(ours.items(), config, "cpu"), build(list(theirs.values()))
    for each in (optimizer, reference):
        to_training(each)
    for step in range(NUM_STEPS):
        for parameters, each in ((ours, optimizer), (theirs, reference)):
            pull(parameters, step)
            each.step()
    for each in (optimizer, reference):
        to_evaluation(each)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("scale_parameter", [False, True])
def test_adafactor_is_transformers(scale_parameter: bool) -> None:
    from transformers.optimization import Adafactor

    config = AdafactorConfig(learning_rate=1e-2, weight_decay=0.1, scale_parameter=scale_parameter)
    assert_same_ends(
        config,
        lambda parameters: Adafactor(
            parameters, lr=1e-2, weight_decay=0.1, scale_parameter=scale_parameter, relative_step=False
        ),
    )


def test_fira_is_pytorch_optimizers() -> None:
    from pytorch_optimizer import Fira

    def build(parameters: list[nn.Parameter]) -> Any:
        low_rank = {"rank": 4, "update_proj_gap": 100, "scale": 0.25, "projection_type": "std"}
        return Fira([{"params": parameters, **low_rank}], lr=1e-2, eps=1e-6)

    assert_same_ends(FiraConfig(learning_rate=1e-2, rank=4, update_proj_gap=100), build)


@pytest.mark.oracle
def test_galore_is_the_authors() -> None:
    from galore_torch import GaLoreAdamW

    def build(parameters: list[nn.Parameter]) -> Any:
        low_rank = {"rank": 4, "update_proj_gap": 100, "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([{"params": parameters, **low_rank}], lr=1e-2, no_deprecation_warning=True)

    assert_same_ends(GaLoreConfig(learning_rate=1e-2, rank=4, update_proj_gap=100), build)


@pytest.mark.oracle
@pytest.mark.parametrize("config", [ApolloConfig(learning_rate=1e-2, rank=4), ApolloMiniConfig(learning_rate=1e-3)])
def test_apollo_is_the_authors(config: ApolloConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same projections: theirs come from another generator, so both are given a third."""
    from apollo_torch import APOLLOAdamW, random_projector

    def projection(rank: int, side: int) -> Tensor:
        return torch.randn(rank, side, generator=torch.Generator().manual_seed(5))

    def theirs(shape: tuple[int, int], **options: Any) -> Tensor:
        rank, side = min(shape), max(shape)
        return projection(rank, side) if shape[0] == rank else projection(rank, side).t()

    monkeypatch.setattr(random_projector, "stable_randn", theirs)
    monkeypatch.setattr(
        "tunelab.optim.low_rank.gaussian_projection",
        lambda rank, like, key: projection(rank, like.shape[1]) / rank**0.5,
    )

    def build(parameters: list[nn.Parameter]) -> Any:
        low_rank = {"rank": config.rank, "update_proj_gap": 200, "scale": config.scale, "proj_type": "std"}
        kind = {"proj": "random", "scale_type": "tensor" if config.name == "apollo_mini" else "channel"}
        return APOLLOAdamW([{"params": parameters, **low_rank, **kind}], lr=config.learning_rate)

    assert_same_ends(config, build)


@pytest.mark.oracle
def test_schedule_free_is_the_authors_reference() -> None:
    from schedulefree import AdamWScheduleFreeReference

    config = ScheduleFreeAdamWConfig(learning_rate=1e-2, weight_decay=0.1)
    assert_same_ends(config, lambda parameters: AdamWScheduleFreeReference(parameters, lr=1e-2, weight_decay=0.1))


def test_the_projections_of_apollo_are_not_all_one() -> None:
    like = torch.zeros(1, 8)
    assert not torch.equal(gaussian_projection(4, like, (0, 1, 2)), gaussian_projection(4, like, (0, 1, 3)))
