"""4-bit bases: what bitsandbytes packs, from whatever kind of source, and how a packed model is told, read and used."""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from tests.models.adapter_kinds import gpt2, llama
from tests.models.small_models import CPU, save_folder, write_gguf
from tunelab.config import LoRAConfig, ModelConfig
from tunelab.errors import ConfigError, MachineError
from tunelab.models.adapters import adapt_skeleton, attach_adapter, linear_layers
from tunelab.models.engine import choose_layout
from tunelab.models.generation import GenerationSettings, generate
from tunelab.models.loading import load_model, load_skeleton
from tunelab.models.quantised import (
    FourBit,
    dense,
    dequantise,
    is_quantised,
    packed_layers,
    quantise,
    quantised_bytes,
)
from tunelab.models.saving import weights_fingerprint

IDS = torch.tensor([[5, 9, 700, 3, 41, 8]])


def config(place: Path | str, **changes: object) -> ModelConfig:
    return ModelConfig(**({"name": str(place), "device": "cpu", "load_in_4bit": True} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize(
    ("changes", "kind", "double"),
    [
        ({}, "nf4", True),
        ({"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}, "fp4", False),
        ({"precision": "bf16-pure"}, "nf4", True),
    ],
)
def test_a_folder_is_packed_as_it_is_read(
    build: object, changes: dict, kind: str, double: bool, tmp_path: Path
) -> None:
    """Each linear layer of the body holds bitsandbytes' own rounding of its weight; nothing else has changed."""
    plain = build()  # type: ignore[operator]
    loaded = load_model(config(save_folder(plain, tmp_path / "base"), **changes))
    dtype = torch.bfloat16 if changes.get("precision") else torch.float32
    layers = linear_layers(plain)
    assert is_quantised(loaded.model)
    assert packed_layers(loaded.model).keys() == layers.keys()
    for name, layer in packed_layers(loaded.model).items():
        weight = layers[name].weight.detach().to(dtype)
        weight = weight.T.contiguous() if isinstance(layers[name], Conv1D) else weight
        codes, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=double, quant_type=kind
        )
        assert torch.equal(layer.weight.data, codes)
        assert torch.equal(dense(layer.weight), bitsandbytes.functional.dequantize_4bit(codes, state))
        assert dense(layer.weight).dtype == dtype
        assert layer.weight.quant_state.nested == double
    for name, parameter in loaded.model.named_parameters():
        assert not parameter.requires_grad
        if name in dict(plain.named_parameters()) and parameter.is_floating_point():
            assert torch.equal(parameter, plain.get_parameter(name).to(dtype))
    assert type(loaded.model.get_output_embeddings()) is nn.Linear
    assert loaded.num_parameters == plain.num_parameters()


@pytest.mark.parametrize("build", [gpt2, llama])
def test_packed_after_loading_it_is_the_same_model(build: object, tmp_path: Path) -> None:
    """What is done to GGUF files and `tiny-gpt2` is what transformers does to a folder."""
    read = load_model(config(save_folder(build(), tmp_path / "base")))  # type: ignore[operator]
    packed = load_model(config(tmp_path / "base", load_in_4bit=False))
    quantise(packed.model, linear_layers(packed.model), FourBit("nf4", True, torch.float32), CPU)
    assert weights_fingerprint(packed.model) == weights_fingerprint(read.model)
    with torch.no_grad():
        assert torch.equal(packed.model(IDS).logits, read.model(IDS).logits)
    dequantise(packed.model)
    assert not is_quantised(packed.model)
    assert [type(m) for m in packed.model.modules()] == [type(m) for m in build().modules()]  # type: ignore[operator]


def test_gguf_files_and_the_tiny_model(tmp_path: Path) -> None:
    plain = llama()
    write_gguf(plain, tmp_path / "model.gguf")
    loaded = load_model(config(tmp_path / "model.gguf"))
    assert packed_layers(loaded.model).keys() == linear_layers(plain).keys()
    assert len(packed_layers(load_model(config("tiny-gpt2")).model)) == 8


def test_weights_that_lie_packed_on_disk(tmp_path: Path) -> None:
    """bitsandbytes' own checkpoints are a base when that is asked for; everything else quantised is refused."""
    save_folder(llama(), tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, quantization_config=settings)
    save_folder(packed, tmp_path / "packed")
    loaded = load_model(config(tmp_path / "packed"))
    expected = load_model(config(tmp_path / "base"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, expected.model(IDS).logits, atol=1e-6, rtol=1e-6)
    attach_adapter(loaded, LoRAConfig(r=2), seed=0)
    choose_layout(loaded, "packed", 16)
    assert loaded.shortcuts.fused_blocks
    with pytest.raises(ConfigError, match=r"quantised to 4 bits.*set model\.load_in_4bit: true"):
        load_model(config(tmp_path / "packed", load_in_4bit=False))
    with pytest.raises(ConfigError, match=r"model\.bnb_4bit_quant_type: the weights on disk have nf4; leave it out"):
        load_model(config(tmp_path / "packed", bnb_4bit_quant_type="fp4"))
    file = tmp_path / "packed" / "config.json"
    file.write_text(file.read_text().replace('"load_in_4bit": true', '"load_in_8bit": true, "load_in_4bit": false'))
    with pytest.raises(ConfigError, match=r"is quantised \(bitsandbytes\), and such weights cannot be trained on"):
        load_model(config(tmp_path / "packed"))


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MachineError, match=r"model\.load_in_4bit: bitsandbytes is not installed.*quantization"):
        load_model(config("tiny-gpt2"))
    assert is_quantised(load_skeleton(config("tiny-gpt2"))), "a forecast needs none of it"


def test_a_skeleton_keeps_its_shapes(tmp_path: Path) -> None:
    skeleton = load_skeleton(config(save_folder(gpt2(), tmp_path / "base")))
    assert skeleton.num_parameters() == gpt2().num_parameters()
    adapt_skeleton(skeleton, LoRAConfig(r=2, use_dora=True))
    with pytest.raises(ConfigError, match="PiSSA"):
        adapt_skeleton(load_skeleton(config(tmp_path / "base")), LoRAConfig(init_lora_weights="pissa"))


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (300, 257), (1024, 1024)])
@pytest.mark.parametrize("double", [True, False])
def test_bytes_by_the_formula_are_those_of_the_tensors(shape: tuple[int, int], double: bool) -> None:
    codes, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(shape), blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    kept = [codes, state.absmax, state.code]
    if double:
        kept += [state.offset.reshape(1), state.state2.absmax, state.state2.code]
    assert quantised_bytes(shape[0] * shape[1], double) == sum(t.numel() * t.element_size() for t in kept)


def test_a_big_matrix_takes_the_papers_bits() -> None:
    assert 8 * quantised_bytes(4096 * 4096) / 4096**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-3)
    assert 8 * quantised_bytes(4096 * 4096, double_quant=False) / 4096**2 == pytest.approx(4.5, rel=1e-3)


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
def test_answers_are_those_of_the_models_own_modules(build: object, dora: bool, four_bit: bool, tmp_path: Path) -> None:
    loaded = load_model(config(save_folder(build(), tmp_path / "base"), load_in_4bit=four_bit))  # type: ignore[operator]
    attach_adapter(loaded, LoRAConfig(r=4, use_dora=dora), seed=0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    prompts, settings = [[5, 9, 700], [8, 1, 2, 3, 4]], GenerationSettings(max_new_tokens=8, temperature=0.0)
    answers = []
    for kernels in ("auto", "plain"):
        choose_layout(loaded, "packed", 16, kernels)  # type: ignore[arg-type]
        assert loaded.shortcuts.fused_blocks == (kernels == "auto"), loaded.blocks_reason
        answers.append([answer.ids for answer in generate(loaded, prompts, settings)])
    assert answers[0] == answers[1]


def test_an_inference_pass_leaves_the_packed_weights_alone(tmp_path: Path) -> None:
    """On CPUs with bf16 instructions bitsandbytes would pack them anew, and a run's bits would depend on it."""
    loaded = load_model(config(save_folder(gpt2(), tmp_path / "base")))
    before = weights_fingerprint(loaded.model)
    codes = {name: layer.weight.data.clone() for name, layer in packed_layers(loaded.model).items()}
    with torch.inference_mode():
        loaded.model(IDS)
    assert all(torch.equal(layer.weight.data, codes[name]) for name, layer in packed_layers(loaded.model).items())
    assert weights_fingerprint(loaded.model) == before
