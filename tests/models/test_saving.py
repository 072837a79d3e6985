"""A saved model is a plain transformers folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedModel

from tests.models.small_models import as_loaded, save_folder, small_gpt2, small_llama
from tunelab.config import ModelConfig
from tunelab.models.attention import PACKED_ATTENTION, register_packed_attention
from tunelab.models.loading import load_model
from tunelab.models.saving import save_model, weights_fingerprint

IDS = torch.tensor([[5, 9, 700, 3]])
CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def small_tied_llama() -> PreTrainedModel:
    return small_llama(tie_word_embeddings=True)


@pytest.mark.parametrize("build", [small_gpt2, small_llama, small_tied_llama])
def test_stock_transformers_computes_the_same_logits(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    save_folder(build(), tmp_path / "original")
    loaded = load_model(ModelConfig(name=str(tmp_path / "original"), device="cpu"))
    loaded.tokenizer.chat_template = CHAT_TEMPLATE
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.01 * torch.ones_like(parameter))  # as training would
    expected = loaded.model(IDS).logits
    register_packed_attention()
    loaded.model.set_attn_implementation(PACKED_ATTENTION)

    save_model(loaded, tmp_path / "saved")

    assert loaded.model.config._attn_implementation == PACKED_ATTENTION
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(stock(IDS).logits, expected)
    assert weights_fingerprint(stock) == weights_fingerprint(loaded.model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer("Human: é").input_ids == loaded.tokenizer("Human: é").input_ids
    assert tokenizer.pad_token is None
    again = load_model(ModelConfig(name=str(tmp_path / "saved"), device="cpu"))
    assert torch.equal(again.model(IDS).logits, expected)


def test_the_files_are_plain_and_name_nothing_of_ours(tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(name="tiny-gpt2", device="cpu", dropout=0.25))
    register_packed_attention()
    loaded.model.set_attn_implementation(PACKED_ATTENTION)
    save_model(loaded, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == expected
    for name in names - {"model.safetensors"}:
        assert "tunelab" not in (tmp_path / name).read_text()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["dtype"] == "float32"
    assert not any("attn_implementation" in key for key in config)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors, "tied to the embedding"
    assert len(tensors) == len(loaded.model.state_dict()) - 1


def test_a_saved_config_has_the_dropout_the_model_came_with(tmp_path: Path) -> None:
    """What a run trains with is the recipe's; the model's own values are not its business."""
    save_folder(small_gpt2(attn_pdrop=0.3, resid_pdrop=0.2), tmp_path / "original")
    loaded = load_model(ModelConfig(name=str(tmp_path / "original"), device="cpu", dropout=0.05))
    save_model(loaded, tmp_path / "saved")
    config = GPT2Config.from_pretrained(tmp_path / "saved")
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.3, 0.2, 0.1)
    assert loaded.model.config.attn_pdrop == 0.05


def test_bf16_weights_stay_bf16(tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(name="tiny-gpt2", device="cpu", precision="bf16-pure"))
    save_model(loaded, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert weights_fingerprint(stock) == weights_fingerprint(loaded.model)


def test_a_hub_generation_config_that_contradicts_itself_is_saved_as_it_came(tmp_path: Path) -> None:
    """Many published models set a temperature and no do_sample; transformers refuses to write such a file anew."""
    save_folder(small_gpt2(), tmp_path / "original")
    file = tmp_path / "original" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6, "top_p": 0.9}))
    loaded = load_model(ModelConfig(name=str(tmp_path / "original"), device="cpu"))
    save_model(loaded, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"]) == (0.6, 0.9)


def test_fingerprint_changes_with_one_bit_and_not_with_anything_else() -> None:
    model = small_gpt2()
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(small_gpt2())
    assert len(before) == 64
    model.train()
    model.config.attn_pdrop = 0.7
    assert weights_fingerprint(model) == before
    weight = model.transformer.h[1].mlp.c_fc.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1
    assert weights_fingerprint(model) != before
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1
    assert weights_fingerprint(model) == before
    assert weights_fingerprint(model.to(torch.bfloat16)) != before


def test_a_model_without_original_dropout_keeps_its_own(tmp_path: Path) -> None:
    save_model(as_loaded(small_gpt2(attn_pdrop=0.4)), tmp_path)
    assert GPT2Config.from_pretrained(tmp_path).attn_pdrop == 0.4
