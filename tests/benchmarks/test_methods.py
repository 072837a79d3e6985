"""`benchmarks methods`: recipes that differ in the method alone, figures from invented arms, page and plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import methods
from benchmarks.methods import ARMS, Settings, summarise
from benchmarks.methods_page import END, START, methods_block, update_page, write_plot
from tunelab.config import parse_recipe

SETTINGS = Settings(24, 8, 160, 2, "train.jsonl", "test.jsonl")
RECORDS = 80


def arm(shift: float, trained: int, **more: Any) -> dict[str, Any]:
    """Losses `shift` nats a token above those of the start, the same records being hard for all."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 150, RECORDS)
    level = rng.normal(2.4, 0.5, RECORDS)
    return {
        "records": list(range(RECORDS)), "nll": ((level + shift) * tokens).tolist(), "tokens": tokens.tolist(),
        "parameters": 1000, "trainable_parameters": trained, "learning_rate": 2e-4, "layout": "packed, fused",
        "cost": {"tokens": 5000, "tokens_per_second": 50.0, "seconds": {"training": 100.0},
                 "peak_memory_bytes": 2**31},
        "forecast_and_measured": {"peak_memory_bytes": {"forecast": 2**31, "measured": 2**31}},
        "train_losses": [2.0],
    } | more  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    found = {
        "before": arm(0.0, 0),
        "full": arm(-0.3, 1000),
        "lora-4": arm(-0.2, 40),
        "qlora-16": arm(-0.1, 160, before=arm(0.05, 0)),
    }
    origin = {
        "command": "python -m benchmarks methods", "cpu": "a CPU", "threads": 2, "date": "2026-01-02T03",
        "commit": "abcdef0123456", "uncommitted_changes": False,
    }  # fmt: skip
    return summarise(found, SETTINGS, tuned=False) | {"provenance": origin}


def test_arms_differ_in_the_method_alone(tmp_path: Path) -> None:
    recipes = {
        name: parse_recipe(SETTINGS.recipe(adapter, four_bit=name.startswith("qlora"), output=tmp_path, name="x"))
        for name, (_, adapter) in ARMS.items()
    }
    assert len(recipes) == 10
    first = recipes["full"]
    for name, recipe in recipes.items():
        changed = {key for key, _, _ in first.differences(recipe) if not key.startswith("adapter")}
        allowed = {"optimizer.learning_rate"} | ({"model.load_in_4bit"} if name == "qlora-16" else set())
        assert changed <= allowed, name
    assert recipes["lora-1"].optimizer.learning_rate == recipes["lora-64"].optimizer.learning_rate


def test_changes_are_paired(result: dict[str, Any]) -> None:
    """Records differ far more than methods: an interval of the loss is wide, of the change narrow."""
    before, full, lora, qlora = result["rows"]
    assert before["loss"]["value"] == pytest.approx(full["loss"]["value"] + 0.3)
    assert full["loss"]["high"] - full["loss"]["low"] > 0.1
    assert full["change"]["value"] == pytest.approx(-0.3)
    assert full["change"]["high"] - full["change"]["low"] < 1e-6
    assert lora["against_full"]["value"] == pytest.approx(0.1)
    assert qlora["change"]["value"] == pytest.approx(-0.15), "against the base in four bits, which it started from"
    assert lora["trainable_share"] == 0.04
    assert "against_full" not in full


def test_arms_of_other_tokens_are_refused() -> None:
    other = arm(-0.1, 40)
    other["cost"]["tokens"] = 4999
    with pytest.raises(AssertionError, match="the same tokens"):
        summarise({"before": arm(0.0, 0), "full": arm(-0.3, 1000), "lora-4": other}, SETTINGS, tuned=False)


def test_page_and_plot(result: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "adapters.md"
    page.write_text(f"# Adapters\n{START}\nold\n{END}\nrest\n")
    update_page(page, result)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("# Adapters")
    assert text.endswith(f"{END}\nrest\n")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "| 1,000 | 100.00% | 2e-04 | 2.00 GiB | 50 |" in lines["full tuning"]
    assert "−0.300 [−0.300, −0.300]" in lines["full tuning"]
    assert "in 4 bits" in lines["QLoRA, r = 16, NF4"]
    write_plot(tmp_path / "images" / "methods.svg", result)
    first = (tmp_path / "images" / "methods.svg").read_bytes()
    write_plot(tmp_path / "images" / "methods.svg", result)
    assert (tmp_path / "images" / "methods.svg").read_bytes() == first, "the same bytes from the same result"
    assert b"<script" not in first
    assert "methods.svg" in methods_block(result)


def test_an_arm_that_was_finished_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(command: list[str], **options: Any) -> Any:
        started.append(command)
        Path(command[-1]).write_text(json.dumps(arm(0.0, 1)))
        return type("Ended", (), {"returncode": 0})

    monkeypatch.setattr(methods.subprocess, "run", start)
    options: dict[str, Any] = {"factor": 1.0, "steps": 2}
    first = methods._run(tmp_path, "lora-4", SETTINGS, ARMS["lora-4"][1], **options)
    assert methods._run(tmp_path, "lora-4", SETTINGS, ARMS["lora-4"][1], **options) == first
    assert len(started) == 1
    methods._run(tmp_path, "lora-4", SETTINGS, ARMS["lora-4"][1], factor=3.0, steps=2)
    assert len(started) == 2, "another rate is another arm"
