"""`tunelab plan` as people and programs meet it."""

from __future__ import annotations

from pathlib import Path

import pytest

RECIPE = """\
model: {name: tiny-gpt2}
data: {train: builtin:helpful-mini, limit_train: 24, max_length: 128}
method: {name: sft}
training: {max_steps: 3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_parts_and_verdict(tunelab, recipe: Path) -> None:
    ended = tunelab("plan", recipe, "--device", "cpu", "--no-time", "--quiet")
    assert ended.code == 0
    for word in ("weights", "framework", "peak", "Fits in"):
        assert word in ended.out
    assert max(map(len, ended.out.splitlines()[9:])) <= 80, "the table of parts"
    assert "\x1b" not in ended.out, "no colour in a pipe"


def test_what_does_not_fit_ends_with_4(tunelab, recipe: Path) -> None:
    ended = tunelab("plan", recipe, "--memory", "400MB", "--json", "--quiet")
    assert ended.code == 4
    assert ended.json["fits"] is False
    assert ended.json["schema_version"] == 1
    assert ended.json["target"]["device"] == "cuda"


def test_an_amount_is_explained(tunelab, recipe: Path) -> None:
    ended = tunelab("plan", recipe, "--memory", "15")
    assert ended.code == 2
    assert "did you mean 15GB?" in ended.err
