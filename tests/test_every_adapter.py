"""Whole runs with every kind of adapter that goes with the model's layers: resumed to the bit, cut into micro-batches,
under gradient checkpointing, evaluated and exported. `tiny-gpt2`, a second each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models.adapter_kinds import LAYERWISE, Kind, lora
from tests.models.small_models import save_folder
from tests.models.test_kinds import bert
from tunelab.config import ModelConfig, parse_recipe
from tunelab.config.adapters import AdapterConfig, IA3Config
from tunelab.errors import ConfigError
from tunelab.evaluation.evaluate import arms_of
from tunelab.export import export_model
from tunelab.models.loading import load_model
from tunelab.models.saving import weights_fingerprint
from tunelab.progress import SilentProgress
from tunelab.runs import RunFolder
from tunelab.train import train

DATA = "builtin:helpful-mini"
IDS = torch.tensor([[5, 9, 700, 3, 41, 8]])
Make = Callable[..., RunFolder]
EVERY = [pytest.param(kind, id=kind.name) for kind in LAYERWISE]


@pytest.fixture(autouse=True)
def _as_it_was() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path) -> Make:
    """Train `kind` for three steps of four records; other values by their key paths with `__` for the dot."""
    numbers = itertools.count()

    def make(kind: Kind, **settings: Any) -> RunFolder:
        recipe: dict[str, Any] = {
            "model": {"name": "tiny-gpt2", "device": "cpu", "load_in_4bit": kind.four_bit},
            "data": {"train": DATA, "eval": DATA, "limit_train": 12, "limit_eval": 4, "max_length": 96},
            "adapter": kind.config.model_dump(),
            "method": {"name": "sft"},
            "optimizer": {"name": "adamw", "learning_rate": 2e-3},
            "training": {
                "per_device_train_batch_size": 4,
                "num_threads": 1,
                "save_steps": 1,
                "save_total_limit": 3,
                "output_dir": str(tmp_path / "runs"),
                "run_name": f"run{next(numbers)}",
            },
            "evaluation": {"eval_steps": 3, "generation_prompts": 0},
        }
        for path, value in settings.items():
            section, _, key = path.partition("__")
            recipe[section][key] = value
        return train(parse_recipe(recipe), progress=SilentProgress())

    return make


def steps(made: RunFolder) -> list[Path]:
    return sorted(made.checkpoints.glob("step-*"))


def losses(made: RunFolder) -> list[float]:
    return [row["train/loss"] for row in made.metrics("train")]


def forget(made: RunFolder, step: int) -> dict[str, bytes]:
    """Take away every checkpoint after `step`; the tensors of the last one."""
    last = {path.name: path.read_bytes() for path in steps(made)[-1].glob("*.safetensors")}
    (made.path / "best").unlink(missing_ok=True)
    for folder in steps(made)[step:]:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return last


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_resumed_it_has_the_same_bits(
    run: Make, kind: Kind, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELAB_CACHE", str(tmp_path / "one"))
    made = run(kind, method__name=method)
    assert losses(made)[-1] != losses(made)[0]
    if method == "dpo":
        # The policy starts as its reference, whatever the adapter does to the weights below it.
        assert made.metrics("train")[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    curve, last = losses(made), forget(made, step=1)
    monkeypatch.setenv("TUNELAB_CACHE", str(tmp_path / "two"))  # the reference is computed again, from the checkpoint
    again = train(made.recipe(), progress=SilentProgress(), resume=made)
    assert again.record()["resumes"][-1]["step"] == 1
    assert losses(again) == curve
    assert {path.name: path.read_bytes() for path in steps(again)[-1].glob("*.safetensors")} == last


@pytest.mark.parametrize("kind", [case for case in EVERY if case.id in ("lora", "bias", "dora", "ia3", "qlora")])
def test_1_by_4_is_4_by_1_and_checkpointing_changes_nothing(run: Make, kind: Kind) -> None:
    one = run(kind)
    cut = run(kind, training__per_device_train_batch_size=1, training__gradient_accumulation_steps=4)
    thrifty = run(kind, training__gradient_checkpointing=True)
    for other in (cut, thrifty):
        assert losses(other) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_exported_computes_what_was_trained(run: Make, kind: Kind, tmp_path: Path) -> None:
    made = run(kind)
    trained = load_model(made.recipe().model.at(str(steps(made)[-1])), adapters="keep")
    merged = export_model(made, tmp_path / "merged", "last", merge=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, trained.model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (merged.warning is not None) == kind.four_bit
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    if not kind.four_bit:
        with pytest.raises(ConfigError, match=r"--base: is for --merge of a run with model\.load_in_4bit"):
            export_model(made, tmp_path / "other", merge=True, base="original")
        return
    other = export_model(made, tmp_path / "original", "last", merge=True, base="original")
    assert other.warning != merged.warning
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32)
    with torch.no_grad():
        assert (original(IDS).logits - trained.model(IDS).logits).abs().max() > 1e-3
    tensors, plain = load_file(tmp_path / "original" / "model.safetensors"), load_model(ModelConfig(name="tiny-gpt2"))
    embedding = plain.model.get_input_embeddings().weight
    assert torch.equal(tensors["transformer.wte.weight"], embedding)


@pytest.mark.parametrize("kind", [kind for kind in LAYERWISE if kind.four_bit], ids=lambda kind: kind.name)
def test_an_evaluation_measures_the_quantised_model(run: Make, kind: Kind) -> None:
    """Base and run both on 4-bit weights, the adapter beside them."""
    base, tuned = (load_model(arm.model) for arm in arms_of(run(kind)))
    assert base.adapter is None
    assert tuned.adapter is not None
    assert weights_fingerprint(base.model) == weights_fingerprint(tuned.model)


def test_a_run_on_a_run_on_a_quantised_base(run: Make) -> None:
    """The first adapter is folded into the 4-bit weights, the second trained on those; resumed it finds them again."""
    kind = next(kind for kind in LAYERWISE if kind.name == "qlora")
    first = run(kind)
    second = run(kind, model__name=str(first.path), method__name="dpo")
    curve, last = losses(second), forget(second, step=1)
    again = train(second.recipe(), progress=SilentProgress(), resume=second)
    assert losses(again) == curve
    assert {path.name: path.read_bytes() for path in steps(again)[-1].glob("*.safetensors")} == last


def test_four_bit_weights_do_not_learn(run: Make) -> None:
    kind = next(kind for kind in LAYERWISE if kind.name == "qlora")
    made = run(kind)
    data = made.recipe().resolved()
    data["training"]["run_name"] = "other"
    for adapter in (None, {"name": "partial", "biases": True}):
        with pytest.raises(ConfigError, match=r"model\.load_in_4bit: 4-bit weights cannot learn"):
            train(parse_recipe(data | {"adapter": adapter}), progress=SilentProgress())
    pissa = {"name": "lora", "init_lora_weights": "pissa"}
    with pytest.raises(ConfigError, match=r"adapter\.init_lora_weights: PiSSA .* quantised base"):
        train(parse_recipe(data | {"adapter": pissa}), progress=SilentProgress())


@pytest.mark.parametrize("adapter", [lora(), IA3Config()], ids=["lora", "ia3"])
def test_a_bert_that_is_a_decoder(run: Make, adapter: AdapterConfig, tmp_path: Path) -> None:
    """On padded rows, as its head is more than one product: trained, answering, exported and read by transformers."""
    base = save_folder(bert(), tmp_path / "bert")
    kind = Kind("bert", adapter, lambda model: 0)
    made = run(kind, model__name=str(base), optimizer__learning_rate=3e-2, evaluation__generation_prompts=1,
               evaluation__max_new_tokens=4)  # fmt: skip
    described = made.record()["model"]
    assert (described["architecture"], described["layout"]) == ("BertLMHeadModel", "padded")
    evaluated = [row["eval_train/loss"] for row in made.metrics("eval")]
    assert evaluated[-1] < evaluated[0] - 0.01
    export_model(made, tmp_path / "merged", "last", merge=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    trained = load_model(made.recipe().model.at(str(steps(made)[-1])), adapters="keep")
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, trained.model(IDS).logits, atol=1e-5, rtol=1e-5)
        changed = IDS.clone()
        changed[0, -1] = 7
        torch.testing.assert_close(trained.model(changed).logits[:, :-1], trained.model(IDS).logits[:, :-1])
