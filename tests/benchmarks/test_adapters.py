"""`benchmarks adapters`: both sides do the same work, and the figures are of the right runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.adapters import ADAPTERS, SIDES, summarise
from benchmarks.arms import tunelab_arm
from benchmarks.jobs import Job, TokenExample, write_examples
from benchmarks.report import adapters_table
from tunelab.models.tiny import build_tiny_model, build_tiny_tokenizer, tiny_config


@pytest.fixture
def work(tmp_path: Path) -> dict[str, Any]:
    """tiny-gpt2 as a folder, and eight examples of unequal length."""
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = tiny_config()
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    build_tiny_model(config).save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(1)

    def ids() -> list[int]:
        return torch.randint(1, 200, (int(torch.randint(2, 20, (1,), generator=generator)),)).tolist()

    write_examples(tmp_path / "examples.jsonl", [TokenExample(ids(), [ids()]) for _ in range(8)])
    return {
        "work": "lora", "side": "tunelab", "model": str(tmp_path / "model"),
        "examples": str(tmp_path / "examples.jsonl"), "batch_size": 4, "steps": 2, "threads": 1,
    }  # fmt: skip


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_all_sides_have_the_same_losses(adapter: str, work: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", torch.backends.mkldnn.is_available)  # a side replaces it
    found = {
        side: tunelab_arm.measure(Job(**work, options={"adapter": ADAPTERS[adapter], **options}))
        for side, options in SIDES.items()
    }
    assert found["ours"]["shortcuts"]["fused_blocks"]
    assert not found["peft"]["shortcuts"]["fused_blocks"]
    assert found["ours"]["losses"][1] != found["ours"]["losses"][0]
    for side in SIDES:
        assert found[side]["losses"] == pytest.approx(found["peft"]["losses"], rel=1e-5), side
        assert found[side]["trainable_parameters"] == found["peft"]["trainable_parameters"]


def run(seconds: float, memory: int, loss: float = 2.0) -> dict[str, Any]:
    return {
        "step_seconds": [9.0, seconds, seconds], "losses": [loss] * 3, "memory": {"peak_above_imports": memory},
        "trainable_parameters": 7, "cpu_share": 1.0,
    }  # fmt: skip


def test_each_round_is_held_against_its_own() -> None:
    """The second round is slow for both: its ratio is what counts, and the warm-up step does not."""
    found = {
        "ours": [run(1.0, 100), run(2.0, 100), run(1.0, 100)],
        "blocks alone": [run(1.0, 100), run(2.0, 100), run(1.0, 100)],
        "peft": [run(1.5, 200), run(4.0, 200), run(1.3, 200)],
    }
    row = summarise("LoRA, r = 8", found, [50, 10, 30], "float32")
    ours = row["sides"]["ours"]
    assert ours["speed"]["values"] == pytest.approx([1.5, 2.0, 1.3])
    assert ours["speed"]["median"] == pytest.approx(1.5)
    assert ours["tokens_per_second"]["values"] == pytest.approx([20, 10, 20])
    assert ours["memory"]["median"] == pytest.approx(0.5)
    assert (row["target"], row["trainable_parameters"]) == (1.2, 7)
    assert row["sides"]["peft"]["speed"]["median"] == 1.0


def test_another_loss_does_not_count() -> None:
    found = {"ours": [run(1.0, 1, 2.1)], "blocks alone": [run(1.0, 1)], "peft": [run(2.0, 1)]}
    row = summarise("DoRA, r = 16", found, [5, 5, 5], "float32")
    assert not row["sides"]["ours"]["agree"]
    table = adapters_table({"rows": [row], "batch_size": 8, "steps": 3, "repeats": 1, "precision": "float32"})
    ours, alone, peft = table.splitlines()[-3:]
    assert "does not count" in ours
    assert "**2.00×**" in alone
    assert "×" not in peft
