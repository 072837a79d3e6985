"""An optimizer's state as tensors and JSON, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.optim.lean import check_equal, one_step, small_loaded, small_state, weights
from tunelab.config.optimizers import OPTIMIZER_KINDS
from tunelab.optim.saving import pack_state, unpack_state


@pytest.mark.parametrize("precision", ["float32", "bf16-stored"])
@pytest.mark.parametrize("kind", OPTIMIZER_KINDS, ids=lambda kind: kind.model_fields["name"].default)
def test_every_optimizer_goes_on_bit_for_bit_from_its_files(kind: type, precision: str, tmp_path: Path) -> None:
    """bf16 weights have float32 state, which a load must not narrow."""
    loaded = small_loaded(precision=precision)
    state = small_state(loaded, kind(), rounding_seed=0)
    for _ in range(2):
        one_step(state)
    tensors, described = pack_state(state.optimizer)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    text = json.dumps(described)

    again = small_loaded(precision=precision)
    with torch.no_grad():
        for (_, parameter), value in zip(again.named_parameters(), weights(loaded).values(), strict=True):
            parameter.copy_(value)
    resumed = small_state(again, kind(), rounding_seed=0)
    unpack_state(resumed.optimizer, load_file(tmp_path / "optimizer.safetensors"), json.loads(text))
    resumed.counters.step = state.step
    for _ in range(2):
        assert one_step(state) == one_step(resumed)
    check_equal(weights(loaded), weights(again))


def stateful(value: object) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))])
    optimizer.state[optimizer.param_groups[0]["params"][1]] = {"kept": value}
    return optimizer


def test_nested_state_keeps_its_nesting_and_its_types() -> None:
    codes = torch.arange(4, dtype=torch.uint8)
    value = {"codes": codes, "rank": 3, "inner": {"scale": torch.tensor(0.5)}, "done": True}
    tensors, described = pack_state(stateful(value))
    assert set(tensors) == {"1.kept.codes", "1.kept.inner.scale"}
    other = stateful(None)
    unpack_state(other, tensors, json.loads(json.dumps(described)))
    found = other.state[other.param_groups[0]["params"][1]]["kept"]
    assert found["codes"].dtype == torch.uint8
    assert torch.equal(found["codes"], codes)
    assert (found["rank"], found["done"], found["inner"]["scale"].item()) == (3, True, 0.5)


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    """safetensors refuses the same memory twice."""
    table = torch.arange(4.0)
    tensors, _ = pack_state(stateful({"one": table, "two": table[:2], "three": table.view(2, 2).T}))
    save_file(tensors, tmp_path / "state.safetensors")
    assert torch.equal(load_file(tmp_path / "state.safetensors")["1.kept.three"], table.view(2, 2).T)


def test_what_no_checkpoint_can_hold_is_named() -> None:
    with pytest.raises(TypeError, match=r"optimizer state 1\.kept is a Generator"):
        pack_state(stateful(torch.Generator()))


def test_state_of_other_groups_is_refused() -> None:
    tensors, described = pack_state(stateful(1))
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters"):
        unpack_state(torch.optim.SGD([nn.Parameter(torch.zeros(2))]), tensors, described)


def test_hyperparameters_are_the_new_ones_and_counts_the_saved() -> None:
    saved, other = stateful(1), stateful(2)
    saved.param_groups[0] |= {"lr": 0.5, "k": 7}
    other.param_groups[0] |= {"lr": 0.1, "k": 0}
    unpack_state(other, *pack_state(saved))
    assert (other.param_groups[0]["lr"], other.param_groups[0]["k"]) == (0.1, 7)
