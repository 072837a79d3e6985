"""Both sides on the same tiny job: the same losses, the same tokens. Run by `make test-all`, which installs TRL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.jobs import Job, Side, TokenExample, Work, write_examples
from benchmarks.peers import WANTED, peer_arms
from benchmarks.summary import compare_losses
from benchmarks.workloads import ROOT
from tunelab.models.tiny import build_tiny_model, build_tiny_tokenizer, tiny_config

pytestmark = pytest.mark.oracle

STEPS, BATCH_SIZE = 3, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-gpt2 as a folder, without dropout."""
    folder = tmp_path_factory.mktemp("model")
    build_tiny_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = tiny_config()
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    build_tiny_model(config).save_pretrained(folder)
    return folder


def examples(work: Work) -> list[TokenExample]:
    """Twelve of unequal length; ids below 200 are in the vocabulary."""
    generator = torch.Generator().manual_seed(1)

    def ids() -> list[int]:
        length = int(torch.randint(2, 20, (1,), generator=generator))
        return torch.randint(1, 200, (length,), generator=generator).tolist()

    completions = {"sft": 1, "lora": 1, "dpo": 2, "generate": 0}[work]
    return [TokenExample(ids(), [ids() for _ in range(completions)]) for _ in range(STEPS * BATCH_SIZE)]


def answer(work: Work, side: Side, model: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    write_examples(folder / "examples.jsonl", examples(work))
    job = Job(work, side, str(model), str(folder / "examples.jsonl"), BATCH_SIZE, STEPS, 1, options=options)
    job.write(folder / "job.json")
    result = folder / f"{side}.json"
    command = [sys.executable, "-m", f"benchmarks.arms.{side}_arm", str(folder / "job.json"), str(result)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


CASES = [
    (work, arm) for work in ("sft", "lora", "dpo") for wanted in WANTED
    for arm in peer_arms(work, wanted, "cpu")
]  # fmt: skip


@pytest.mark.parametrize(("work", "arm"), CASES, ids=[f"{work}-{arm.name}" for work, arm in CASES])
def test_losses_agree(work: Work, arm: Any, model: Path, tmp_path: Path) -> None:
    ours = answer(work, "tunelab", model, tmp_path, {})
    theirs = answer(work, "trl", model, tmp_path, arm.flags)
    assert ours["trainable_parameters"] == theirs["trainable_parameters"]
    assert len(set(ours["losses"])) == STEPS == len(theirs["step_seconds"])
    assert compare_losses([ours], [theirs], "float32")["agree"], (ours["losses"], theirs["losses"])
    for result in (ours, theirs):
        assert 0 < result["memory"]["peak_above_imports"] < 2**31
        assert result["seconds_to_n"] >= sum(result["step_seconds"])


@pytest.mark.parametrize("flags", [{}, {"cache_implementation": "static"}], ids=["defaults", "static"])
def test_the_same_tokens_are_generated(flags: dict[str, Any], model: Path, tmp_path: Path) -> None:
    ours = answer("generate", "tunelab", model, tmp_path, {"new_tokens": 12})
    theirs = answer("generate", "trl", model, tmp_path, {"new_tokens": 12} | flags)
    assert ours["tokens"] == theirs["tokens"]
    assert {len(row) for row in ours["tokens"]} == {12}
