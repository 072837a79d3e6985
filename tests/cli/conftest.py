"""Two tiny trained runs, and a way to run commands as a person does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tunelab.cli import main
from tunelab.runs import RunFolder

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ("data.limit_train=8", "data.limit_eval=4", "training.max_steps=2", "evaluation.eval_steps=1")
"""Overrides that make the tiny recipes run in a second."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        payload: dict[str, Any] = json.loads(self.out)
        assert payload["schema_version"] == 1
        return payload


@pytest.fixture
def tunelab(capsys: pytest.CaptureFixture[str]):
    """Run a command line in this process; its exit code, stdout and stderr."""

    def run(*words: object) -> Ended:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `sft` and, trained from it, `dpo`."""
    root = tmp_path_factory.mktemp("cli") / "runs"
    for minute, (name, model) in enumerate((("sft", "tiny-gpt2"), ("dpo", str(root / "sft")))):
        words = [name, str(RECIPES / f"tiny-{name}.yaml"), *SMALL, "--quiet", "--json", f"model.name={model}"]
        assert main([*words, f"training.run_name={name}", f"training.output_dir={root}"]) == 0
        # Both may be made within one second; lists are ordered by this.
        RunFolder(root / name).update(created=f"2026-03-04T09:{minute:02d}:00+00:00")
    return root
