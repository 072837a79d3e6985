"""Whole runs with adapters that are no layers: resumed, evaluated, talked to, exported. `tiny-gpt2`, a second each."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.test_train import Notes, _as_it_was, curve, recipe_data
from tunelab.chat import open_session
from tunelab.config import ModelConfig, parse_recipe
from tunelab.errors import ConfigError
from tunelab.evaluation.evaluate import evaluate_run
from tunelab.export import export_model
from tunelab.models.attention import plain_attention
from tunelab.models.loading import load_model
from tunelab.progress import SilentProgress
from tunelab.runs import RunFolder
from tunelab.train import train

__all__ = ["_as_it_was"]

Make = Callable[..., RunFolder]
ADAPTERS: dict[str, dict[str, Any]] = {
    "prefix_tuning": {"name": "prefix_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "p_tuning_v2": {"name": "p_tuning_v2", "num_virtual_tokens": 4},
    "p_tuning": {
        "name": "p_tuning",
        "num_virtual_tokens": 4,
        "encoder_hidden_size": 16,
        "encoder_reparameterization_type": "lstm",
        "encoder_dropout": 0.2,
    },
    "prompt_tuning": {
        "name": "prompt_tuning",
        "num_virtual_tokens": 4,
        "prompt_tuning_init": "text",
        "prompt_tuning_init_text": "Be kind.",
    },
    "partial": {"name": "partial", "last_layers": 1},
    "biases": {"name": "partial", "biases": True},
}
VIRTUAL = [name for name in ADAPTERS if "num_virtual_tokens" in ADAPTERS[name]]


@pytest.fixture
def run(tmp_path: Path) -> Make:
    """Train a recipe; keywords as in `recipe_data`, and `adapter` by its name above."""
    numbers = itertools.count()

    def make(adapter: str, progress: SilentProgress | None = None, **settings: Any) -> RunFolder:
        recipe = recipe_data(tmp_path, **({"training__run_name": f"run{next(numbers)}"} | settings))
        recipe["adapter"] = ADAPTERS[adapter]
        return train(parse_recipe(recipe), progress=progress or SilentProgress())

    return make


def last(made: RunFolder) -> Path:
    return sorted(made.checkpoints.glob("step-*"))[-1]


@pytest.mark.parametrize(
    ("adapter", "method"), [*((name, "sft") for name in ADAPTERS), ("prefix_tuning", "dpo"), ("partial", "dpo")]
)
def test_resumed_from_the_middle_it_has_the_same_bits(run: Make, adapter: str, method: str) -> None:
    """With noise on the embeddings: the newest checkpoint is taken away, and the run goes on from the one before."""
    settings = {"method__name": method, "training__save_steps": 1, "training__neftune_noise_alpha": 5.0}
    made = run(adapter, **settings)
    newest = last(made)
    files = {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}
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


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_a_checkpoint_holds_and_that_it_learns(run: Make, adapter: str) -> None:
    made = run(adapter, training__num_train_epochs=4, optimizer__learning_rate=1e-2)
    names = {path.name for path in last(made).iterdir()}
    assert ("model.safetensors" in names) == (adapter not in VIRTUAL) == ("adapter_config.json" not in names)
    assert ("prompt_encoder.safetensors" in names) == (adapter in ("prefix_tuning", "p_tuning"))
    listed = set(json.loads((last(made) / "manifest.json").read_text())["files"])
    assert listed == names - {"manifest.json"}
    model = made.record()["model"]
    assert 0 < model["trainable_parameters"] < model["parameters"]
    assert model["layout"] == "packed"
    assert model["blocks"] == "fused"
    evaluated = made.metrics("eval")
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"]
    state = load_file(last(made) / "optimizer.safetensors")
    moments = sum(tensor.numel() for name, tensor in state.items() if "exp_avg" in name)
    assert moments == 2 * model["trainable_parameters"]


@pytest.mark.parametrize("adapter", VIRTUAL)
def test_stock_peft_opens_a_run_and_so_do_evaluate_and_chat(run: Make, adapter: str) -> None:
    made = run(adapter, training__num_train_epochs=2, evaluation__generation_prompts=2, evaluation__max_new_tokens=4)
    result = evaluate_run(made, progress=SilentProgress(), generations=1)
    base, own = (arm["metrics"]["eval/nll"]["value"] for arm in result["arms"])
    assert own != base
    ids = torch.tensor([[5, 9, 700, 3, 41, 8]])
    plain = load_model(ModelConfig(name="tiny-gpt2", device="cpu")).model
    stock = PeftModel.from_pretrained(plain, made.path / "best").eval()
    session = open_session(str(made.path), str(made.path.parent), system=None, device="cpu", max_new_tokens=5)
    assert session.loaded.num_virtual_tokens == 4
    assert session.loaded.adapter is not None
    with torch.no_grad(), plain_attention(session.loaded.model):
        torch.testing.assert_close(session.loaded.adapter(ids).logits, stock(ids).logits, atol=1e-5, rtol=1e-5)
    session.reply("Hello?")


@pytest.mark.parametrize("adapter", VIRTUAL)
def test_exported_as_it_is_and_never_merged(run: Make, adapter: str, tmp_path: Path) -> None:
    made = run(adapter)
    with pytest.raises(ConfigError, match="virtual tokens cannot become weights; leave --merge out"):
        export_model(made, tmp_path / "merged", merge=True)
    alone = export_model(made, tmp_path / "alone")
    assert set(alone.files) == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip


def test_a_partial_run_is_a_whole_model(run: Make, tmp_path: Path) -> None:
    made = run("partial")
    exported = export_model(made, tmp_path / "whole")
    assert "model.safetensors" in exported.files
    with pytest.raises(ConfigError, match="has no adapter to merge, it is a whole model"):
        export_model(made, tmp_path / "merged", merge=True)
    base = load_model(ModelConfig(name="tiny-gpt2", device="cpu")).model.state_dict()
    tuned = load_model(ModelConfig(name=str(tmp_path / "whole"), device="cpu")).model.state_dict()
    moved = {name.split(".")[1] for name, tensor in tuned.items() if not torch.equal(tensor, base[name])}
    assert moved == {"h", "ln_f"}
    assert not any(name.startswith("transformer.h.0.") and not torch.equal(t, base[name]) for name, t in tuned.items())


# --- preference tuning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["prefix_tuning", "prompt_tuning", "partial"])
def test_the_reference_is_the_model_as_it_starts(run: Make, adapter: str, tmp_path: Path) -> None:
    """That of full tuning, whose cache is read. A prompt makes the policy another model from the first step on."""
    train(parse_recipe(recipe_data(tmp_path, method__name="dpo")), progress=SilentProgress())
    notes = Notes()
    made = run(adapter, notes, method__name="dpo")
    assert "reference log-probabilities: 12 pairs from the cache" in notes.text
    start = made.metrics("eval")[0]
    same = start["eval/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert same == (adapter == "partial")


def test_a_reference_of_virtual_tokens_keeps_them(run: Make) -> None:
    """A reference that is a run of its own is scored as it was trained; its numbers are not those of its base."""
    first = run("prompt_tuning", optimizer__learning_rate=0.1)
    notes = Notes()
    with_run = run("partial", notes, method__name="dpo", method__reference=str(first.path))
    plain = run("partial", method__name="dpo", method__reference="tiny-gpt2")
    start, other = with_run.metrics("eval")[0], plain.metrics("eval")[0]
    assert other["eval/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert start["eval/loss"] != pytest.approx(0.693147, abs=1e-3)
    assert "pairs from the cache" not in notes.text


# --- what is refused ------------------------------------------------------------------------------------------------


def test_nothing_is_trained_on_top_of_virtual_tokens(run: Make, tmp_path: Path) -> None:
    made = run("p_tuning_v2")
    for changes in ({}, {"adapter": {"name": "lora"}}):
        recipe = recipe_data(tmp_path, model__name=str(made.path), training__run_name="next") | changes
        with pytest.raises(
            ConfigError, match=r"model\.name: .* is made of virtual tokens, which cannot become weights"
        ):
            train(parse_recipe(recipe), progress=SilentProgress())
    assert not (tmp_path / "runs" / "next").exists()


def test_virtual_tokens_count_in_the_context(tmp_path: Path) -> None:
    recipe = recipe_data(tmp_path, data__max_length=510) | {"adapter": {"name": "p_tuning_v2", "num_virtual_tokens": 4}}
    with pytest.raises(
        ConfigError,
        match=r"data\.max_length: 510 is more than the 512 positions of tiny-gpt2 less the adapter's 4 virtual tokens; "
        r"set it to 508 or less",
    ):
        train(parse_recipe(recipe), progress=SilentProgress())
    recipe["adapter"]["num_virtual_tokens"] = 600
    with pytest.raises(ConfigError, match=r"set adapter\.num_virtual_tokens lower"):
        train(parse_recipe(recipe), progress=SilentProgress())


def test_a_cache_does_not_go_with_checkpointing(run: Make) -> None:
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing: in padded rows keys and values"):
        run("prefix_tuning", training__gradient_checkpointing=True, model__layout="padded")
    packed = run("prefix_tuning", training__gradient_checkpointing=True)
    assert curve(packed) == pytest.approx(curve(run("prefix_tuning")), rel=1e-5)


# --- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_noise_is_in_training_alone(tmp_path: Path, method: str) -> None:
    """Before the first step nothing is different; the losses that are trained on are."""
    runs = []
    for alpha in (None, 5.0, 5.0):
        recipe = recipe_data(
            tmp_path, method__name=method, training__neftune_noise_alpha=alpha, training__run_name=f"run{len(runs)}"
        )
        runs.append(train(parse_recipe(recipe), progress=SilentProgress()))
    without, noisy, again = runs
    assert without.metrics("eval")[0]["eval/loss"] == noisy.metrics("eval")[0]["eval/loss"]
    assert curve(without)[0] != curve(noisy)[0]
    assert curve(noisy) == curve(again)
    assert noisy.recipe().training.neftune_noise_alpha == 5.0
    assert without.record()["fingerprint"] != noisy.record()["fingerprint"]
