"""Whole runs with an adapter: what is written, resumed, built upon and exported. `tiny-gpt2`, a second each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.test_train import Notes, _as_it_was, curve, recipe_data
from tunelab.config import ModelConfig, parse_recipe
from tunelab.errors import ConfigError
from tunelab.export import export_model
from tunelab.models.loading import load_model
from tunelab.planner import plan_recipe
from tunelab.progress import SilentProgress
from tunelab.runs import RunFolder
from tunelab.train import train

__all__ = ["_as_it_was"]

Make = Callable[..., RunFolder]
IDS = torch.tensor([[5, 9, 700, 3, 41, 8]])
PARAMETERS = (1024 + 512) * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64
"""Of tiny-gpt2; see test_train."""
TRAINABLE = 4 * 2 * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))
"""r · (in + out) of c_attn, attn.c_proj, c_fc and mlp.c_proj, in two blocks."""


@pytest.fixture
def run(tmp_path: Path) -> Make:
    """Train a recipe with a LoRA of rank 4; keywords as in `recipe_data`."""
    numbers = itertools.count()

    def make(progress: SilentProgress | None = None, **settings: Any) -> RunFolder:
        settings = {"adapter": {"r": 4, "lora_alpha": 8}, "training__run_name": f"run{next(numbers)}"} | settings
        recipe = recipe_data(tmp_path, **{k: v for k, v in settings.items() if k != "adapter"})
        recipe["adapter"] = settings["adapter"]
        return train(parse_recipe(recipe), progress=progress or SilentProgress())

    return make


def last(made: RunFolder) -> Path:
    return sorted(made.checkpoints.glob("step-*"))[-1]


def logits_of(place: Path | str) -> torch.Tensor:
    with torch.no_grad():
        return load_model(ModelConfig(name=str(place), device="cpu")).model(IDS).logits


def test_a_checkpoint_is_the_adapter_and_its_state(run: Make) -> None:
    made = run(training__num_train_epochs=3)
    names = {path.name for path in last(made).iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "manifest.json"} <= names
    assert not {"model.safetensors", "config.json", "README.md"} & names
    state = load_file(last(made) / "optimizer.safetensors")
    assert sum(tensor.numel() for name, tensor in state.items() if "exp_avg" in name) == 2 * TRAINABLE
    model = made.record()["model"]
    assert (model["parameters"], model["trainable_parameters"]) == (PARAMETERS + TRAINABLE, TRAINABLE)
    assert curve(made)[-1] < curve(made)[0]
    assert made.record()["best"]["eval/loss"] < made.metrics("eval")[0]["eval/loss"]
    assert (made.path / "best" / "adapter_config.json").is_file()


def test_the_forecast_says_what_is_trained(tmp_path: Path) -> None:
    recipe = recipe_data(tmp_path) | {"adapter": {"r": 4}}
    told = plan_recipe(parse_recipe(recipe), SilentProgress(), strict=True)
    assert told["model"]["parameters"] == PARAMETERS + TRAINABLE
    assert told["model"]["trainable_parameters"] == TRAINABLE
    steps = 2 * 8 * 4  # AdamW counts its steps in a number for each of A and B of eight layers
    assert told["disk"]["total_bytes"] == (TRAINABLE * 4 * 3 + steps) * (2 + 2)
    whole = plan_recipe(parse_recipe(recipe | {"adapter": None}), SilentProgress(), strict=True)
    assert whole["model"]["trainable_parameters"] == whole["model"]["parameters"] == PARAMETERS


def test_stock_peft_opens_a_run(run: Make) -> None:
    made = run()
    base = load_model(ModelConfig(name="tiny-gpt2", device="cpu")).model
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, made.path / "best").eval()(IDS).logits
    assert not torch.equal(expected, logits_of("tiny-gpt2"))
    torch.testing.assert_close(logits_of(made.path), expected, atol=1e-5, rtol=1e-5)


def test_exported_merged_or_as_it_is(run: Make, tmp_path: Path) -> None:
    made = run()
    merged = export_model(made, tmp_path / "merged", merge=True)
    assert set(merged.files) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted(merged.files)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, logits_of(made.path), atol=1e-5, rtol=1e-5)
    alone = export_model(made, tmp_path / "alone")
    assert set(alone.files) == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert torch.equal(logits_of(tmp_path / "alone"), logits_of(made.path))
    with pytest.raises(ConfigError, match="has no adapter to merge, it is a whole model; leave --merge out"):
        export_model(run(adapter=None), tmp_path / "never", merge=True)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_resumed_from_the_middle_it_has_the_same_bits(run: Make, method: str) -> None:
    """The newest checkpoint is taken away, and the run goes on from the one before."""
    settings = {"method__name": method, "training__save_steps": 1, "adapter": {"r": 4, "lora_dropout": 0.2}}
    made = run(**settings)
    newest, files = last(made), {}
    for path in newest.glob("*.safetensors"):
        files[path.name] = path.read_bytes()
    losses = curve(made)
    (made.path / "best").unlink()
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    again = train(made.recipe(), progress=SilentProgress(), resume=made)
    assert last(again) == newest
    assert again.record()["resumes"][-1]["step"] == 2
    assert {path.name: path.read_bytes() for path in newest.glob("*.safetensors")} == files
    assert curve(again) == losses


def test_1_by_4_is_4_by_1(run: Make) -> None:
    """The update does not depend on how a step is cut into micro-batches.

    By SGD: Adam divides a gradient by its own size, and so makes of rounding a whole step where it is nearly 0.
    """
    settings = {"optimizer": {"name": "sgd", "learning_rate": 0.5}}
    one = run(**settings)
    four = run(**settings, training__per_device_train_batch_size=1, training__gradient_accumulation_steps=4)
    assert curve(one) == pytest.approx(curve(four), rel=1e-5)
    a, b = (load_file(last(made) / "adapter_model.safetensors") for made in (one, four))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_run(run: Make) -> None:
    one, other = run(), run(training__gradient_checkpointing=True)
    assert curve(one) == pytest.approx(curve(other), rel=1e-5)
    assert curve(one, "grad_norm") == pytest.approx(curve(other, "grad_norm"), rel=1e-4)


def test_an_adapter_keeps_its_form_when_a_run_is_resumed(run: Make) -> None:
    made = run()
    changed = parse_recipe(made.recipe().resolved(), ["adapter.r=8"])
    with pytest.raises(ConfigError, match=r"--resume: adapter\.r: an adapter keeps the form it was made with"):
        train(changed, progress=SilentProgress(), resume=made, allow_drift=True)
    assert made.record()["status"] == "completed"


def test_targets_that_are_not_there_are_refused_before_a_run_is_made(run: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: 'q_proj' matches no linear layer of GPT2LMHead"):
        run(adapter={"target_modules": ["q_proj"]})
    assert not (tmp_path / "runs").exists()


# --- preference tuning ----------------------------------------------------------------------------------------------


def test_the_reference_is_the_adapter_switched_off(run: Make) -> None:
    """At the start nothing is preferred; and the cache is that of full tuning, which has the same reference."""
    notes = Notes()
    run(method__name="dpo", adapter=None)
    made = run(notes, method__name="dpo", optimizer__learning_rate=2e-2)
    assert "reference log-probabilities: 12 pairs from the cache" in notes.text
    start = made.metrics("eval")[0]
    assert start["eval/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert start["eval/rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert curve(made)[-1] < 0.69


def test_resumed_without_its_cache_the_reference_is_the_same(run: Make, monkeypatch: Any, tmp_path: Path) -> None:
    """Then it is computed under the learnt adapter, switched off; another reference would be refused."""
    made = run(method__name="dpo")
    digest = made.record()["reference"]
    monkeypatch.setenv("TUNELAB_CACHE", str(tmp_path / "cache"))
    notes = Notes()
    again = train(made.recipe(), progress=notes, resume=made)
    assert "from the cache" not in "\n".join(line for line in notes.lines if line.startswith("reference"))
    assert again.record()["reference"] == digest


def test_another_reference_than_the_start(run: Make) -> None:
    sft = run()
    made = run(method__name="dpo", method__reference=str(sft.path))
    assert made.record()["status"] == "completed"
    assert made.metrics("eval")[0]["eval/loss"] != pytest.approx(0.693147, abs=1e-5)


def test_a_run_on_top_of_an_adapted_one(run: Make) -> None:
    """The first adapter is merged: full or adapted tuning then starts from what it had learnt."""
    sft = run(optimizer__learning_rate=1e-2)
    dpo = run(method__name="dpo", model__name=str(sft.path))
    assert dpo.metrics("eval")[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert torch.equal(logits_of(dpo.path), logits_of(last(dpo)))
    full = run(model__name=str(sft.path), adapter=None)
    assert full.metrics("eval")[0]["eval/loss"] == pytest.approx(curve(sft, "eval/loss")[-1], rel=1e-5)
    assert full.record()["model"]["trainable_parameters"] == PARAMETERS
    assert (last(full) / "model.safetensors").is_file()
