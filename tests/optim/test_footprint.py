"""Formulas of memory: by hand, and temporaries as the profiler counts them. (State: test_properties.py.)"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tunelab.config.optimizers import (
    OPTIMIZER_KINDS,
    AdamMiniConfig,
    AdamW8bitConfig,
    AdamWConfig,
    BAdamConfig,
    GaLoreConfig,
    LISAConfig,
    OptimizerConfig,
    RMSpropConfig,
    SM3Config,
)
from tunelab.optim import ParameterRoles, build_optimizer, to_training
from tunelab.optim.footprint import state_bytes, transient_bytes

NAME = "h.0.mlp.weight"


@pytest.mark.parametrize(
    ("config", "shape", "expected"),
    [
        (AdamWConfig(), (100, 10), 2 * 4000 + 4),
        (AdamMiniConfig(), (100, 10), 4000 + 4 * 100),
        (AdamW8bitConfig(), (100, 10), 2 * 4000),  # too small for 8 bits
        (AdamW8bitConfig(), (100, 41), 2 * (4100 + 4 * 17)),  # 4100 = 16 blocks of 256 and a part
        (GaLoreConfig(rank=4), (100, 10), 4 * (2 * 100 * 4 + 4 * 10)),
        (GaLoreConfig(rank=64), (10, 100), 4 * (2 * 100 * 10 + 10 * 10)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_state_by_hand(config: OptimizerConfig, shape: tuple[int, ...], expected: int) -> None:
    assert state_bytes(config, [(NAME, shape, 4)]) == expected


def test_layers_in_turn_count_those_that_train() -> None:
    """Four layers of 10, 20, 30, 40 weights beside 7: LISA has the two largest and the rest, BAdam the largest."""
    parameters = [(f"h.{n}.weight", (10 * (n + 1),), 4) for n in range(4)] + [("ln_f.weight", (7,), 4)]
    assert state_bytes(LISAConfig(lisa_activated_layers=2), parameters) == 8 * (40 + 30 + 7) + 4 * 3
    assert state_bytes(BAdamConfig(), parameters) == 8 * 40 + 4


def peak_temporaries(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a step allocates at most at one time, and gives back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - max(held, 0)


CASES = [
    *(
        kind(update_proj_gap=2, rank=64) if "update_proj_gap" in kind.model_fields else kind()
        for kind in OPTIMIZER_KINDS
    ),
    RMSpropConfig(momentum=0.5, centered=True),
    SM3Config(momentum=0.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embedding", [False, True], ids=["matrix", "embedding"])
@pytest.mark.parametrize("config", CASES, ids=lambda config: config.name)
def test_temporaries(config: OptimizerConfig, embedding: bool, dtype: torch.dtype) -> None:
    """Of a matrix, at the second step and the third, when state is there: at most 2% too low and 10% too high."""
    roles = ParameterRoles(frozenset({NAME} if embedding else ()))
    parameter = nn.Parameter(torch.randn(512, 256, dtype=dtype))
    optimizer = build_optimizer([(NAME, parameter)], config, "cpu", roles=roles)
    to_training(optimizer)
    measured = []
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter)
        measured.append(peak_temporaries(optimizer))
    found = max(measured[1:])
    formula = transient_bytes(config, [(NAME, (512, 256), parameter.element_size())], roles)
    assert found * 0.98 - 5_000 <= formula <= found * 1.1 + 20_000, (found, formula)
