"""`tunelab plan`: from a config.json alone, for machines that are not here, with changes that do fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunelab.config import parse_recipe
from tunelab.errors import ConfigError
from tunelab.forecast import detect_target
from tunelab.planner import parse_size, plan_recipe
from tunelab.planner.advice import changed
from tunelab.progress import SilentProgress

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with nothing but its config."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def recipe(folder: Path, **changes: Any) -> Any:
    data: dict[str, Any] = {
        "model": {"name": str(folder)},
        "data": {"train": "nobody/nothing", "max_length": 128},
        "method": {"name": "sft"},
    }
    return parse_recipe(data | changes)


def plan(folder: Path, **options: Any) -> dict[str, Any]:
    return plan_recipe(recipe(folder), SilentProgress(), **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("15GB", 15 * 10**9), ("15.5 GiB", 15.5 * 2**30), ("800mb", 8 * 10**8), ("1 TiB", 2**40)],
)
def test_sizes(text: str, expected: float) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [("15", "did you mean 15GB?"), ("GB", "15GB, 16GiB"), ("15 potatoes", "no amount"), ("0GB", "no amount")],
)
def test_wrong_sizes(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match="--memory") as caught:
        parse_size(text)
    assert told in str(caught.value)


def test_a_config_is_enough(folder: Path) -> None:
    found = plan(folder)
    embeddings, layer = 1000 * 64, 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160 + 2 * 64
    assert found["model"]["parameters"] == 2 * embeddings + 2 * layer + 64
    assert "128 tokens" in found["assumption"]
    assert found["counts"]["tokens"] == 1000 * 128
    assert found["counts"]["loss_tokens"] == 1000 * 64
    assert sum(found["memory"]["parts"].values()) == found["memory"]["peak_bytes"]


def test_a_card_that_is_not_here(folder: Path) -> None:
    found = plan(folder, memory_bytes=10**9)
    assert (found["device"], found["precision"], found["fits"]) == ("cuda", "bf16", True)
    assert found["time"]["seconds"] is None


def test_records_are_given_and_the_data_is_not_read(folder: Path) -> None:
    assert plan(folder, records=50)["counts"]["records"] == 50


def test_changes_that_fit_do(folder: Path) -> None:
    wanted = recipe(folder)
    whole = plan_recipe(wanted, SilentProgress(), device="cuda")["memory"]
    room = whole["peak_bytes"] - whole["parts"]["activations"] // 2
    found = plan_recipe(wanted, SilentProgress(), device="cuda", memory_bytes=room)
    assert found["fits"] is False
    assert found["advice"]
    for change in found["advice"]:
        again = changed(wanted, [tuple(override.split("=")) for override in change["overrides"]])
        replanned = plan_recipe(again, SilentProgress(), device="cuda", memory_bytes=room)
        assert replanned["fits"]
        assert replanned["memory"]["peak_bytes"] == change["peak_bytes"]
    assert "the same training" in found["advice"][0]["effects"][0], "the least change comes first"


def test_nothing_fits_in_nothing(folder: Path) -> None:
    assert plan(folder, memory_bytes=10**6)["advice"] == []


def test_memory_of_this_machine() -> None:
    target = detect_target("cpu")
    assert target.memory_bytes is not None
    assert 2**28 < target.memory_bytes < 2**50
    assert target.framework_bytes < target.memory_bytes


def test_the_object_and_its_version(folder: Path) -> None:
    found = plan(folder)
    assert found["schema_version"] == 1
    assert {"device", "precision", "path", "model", "counts", "memory", "compute", "disk", "time"} <= found.keys()
    assert {"target", "fits", "advice", "assumption", "method", "data", "fingerprint"} <= found.keys()
    json.dumps(found)
