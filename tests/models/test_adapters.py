"""The property suite of adapters, on tiny GPT-2 (Conv1D) and Llama (nn.Linear); stock peft is the oracle."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from tests.models.small_models import as_loaded, save_folder, small_gpt2, small_llama
from tunelab.config import LoRAConfig, ModelConfig
from tunelab.errors import ConfigError
from tunelab.models.adapters import (
    ADAPTER_DTYPE,
    adapt_skeleton,
    adapter_disabled,
    attach_adapter,
    find_targets,
    linear_layers,
    merge_adapter,
)
from tunelab.models.checkpointing import enable_checkpointing
from tunelab.models.engine import choose_layout, compute_logprobs
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import load_context_length, load_model, load_skeleton, load_tokenizer
from tunelab.models.packed import _probe_batch
from tunelab.models.saving import save_model, weights_fingerprint

IDS = torch.tensor([[5, 9, 700, 3, 41, 8]])
Build = Callable[[], PreTrainedModel]


def tied_llama() -> PreTrainedModel:
    return small_llama(tie_word_embeddings=True)


MODELS = [small_gpt2, small_llama, tied_llama]
LORA = LoRAConfig(r=4, lora_alpha=8)


def adapted(build: Build, config: LoRAConfig = LORA, seed: int = 0, learnt: bool = True) -> LoadedModel:
    """A model with an adapter; `learnt`: B is no longer zero, as after training."""
    loaded = as_loaded(build())
    attach_adapter(loaded, config, seed)
    if learnt:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return loaded


def logits(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        return loaded.model(IDS).logits


def trainable(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- what an adapter is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_new_adapter_changes_nothing(build: Build, init: bool | str) -> None:
    loaded = adapted(build, LORA.model_copy(update={"init_lora_weights": init}), learnt=False)
    assert torch.equal(logits(loaded), logits(as_loaded(build())))
    assert not loaded.model.training
    a = torch.cat([p.flatten() for name, p in trainable(loaded.model).items() if "lora_A" in name and p.shape[1] == 32])
    # Uniform in ±1/√in has the standard deviation 1/√(3·in); gaussian 1/r.
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 32) if init is True else 1 / 4, rel=0.1)


@pytest.mark.parametrize("build", MODELS)
def test_only_the_adapter_is_trained_and_it_has_r_rows_and_columns_a_layer(build: Build) -> None:
    loaded = adapted(build)
    names = trainable(loaded.model)
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in names)
    sizes = {name: (m.nx, m.nf) if hasattr(m, "nf") else (m.in_features, m.out_features)
             for name, m in linear_layers(build()).items()}  # fmt: skip
    assert loaded.num_trainable_parameters == sum(4 * (before + after) for before, after in sizes.values())
    assert loaded.num_parameters == as_loaded(build()).num_parameters + loaded.num_trainable_parameters


def test_the_transformers_model_stays_what_it_is() -> None:
    loaded = adapted(small_gpt2)
    assert loaded.model.base_model is loaded.model.transformer
    assert loaded.model.get_output_embeddings() is loaded.model.lm_head
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    assert loaded.adapter is not None
    assert loaded.adapter.get_base_model() is loaded.model
    assert not loaded.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
@pytest.mark.parametrize("build", [small_gpt2, small_llama])
def test_the_update_is_the_papers(build: Build, rslora: bool, scale: float) -> None:
    """W + s·B·A by hand, put into a model that knows nothing of adapters."""
    loaded = adapted(build, LORA.model_copy(update={"use_rslora": rslora}))
    plain = build()
    with torch.no_grad():
        for name, layer in linear_layers(plain).items():
            module = loaded.model.get_submodule(name)
            update = scale * module.lora_B["default"].weight @ module.lora_A["default"].weight
            layer.weight += update.T if hasattr(layer, "nf") else update
        expected = plain(IDS).logits
    assert (expected - build()(IDS).logits).abs().max() > 0.1, "the control: the adapter must matter"
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_initial_values_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = trainable(adapted(small_gpt2, seed=3, learnt=False).model)
    two = trainable(adapted(small_llama, seed=3, learnt=False).model)
    assert one.keys() != two.keys()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
    attach_adapter(loaded := as_loaded(small_gpt2()), LORA, seed=3)
    torch.manual_seed(99)
    attach_adapter(again := as_loaded(small_gpt2()), LORA, seed=3)
    other = adapted(small_gpt2, seed=4, learnt=False)
    for name, parameter in trainable(loaded.model).items():
        assert torch.equal(parameter, one[name])
        assert torch.equal(parameter, trainable(again.model)[name])
        assert "lora_B" in name or not torch.equal(parameter, trainable(other.model)[name])


def test_attaching_leaves_the_generator_alone() -> None:
    loaded = as_loaded(small_gpt2())
    before = torch.get_rng_state()
    attach_adapter(loaded, LORA, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_float32_on_a_bf16_base() -> None:
    loaded = as_loaded(small_llama().to(torch.bfloat16))
    attach_adapter(loaded, LORA, seed=0)
    assert {p.dtype for p in trainable(loaded.model).values()} == {ADAPTER_DTYPE} == {torch.float32}


@pytest.mark.parametrize("build", [small_gpt2, small_llama])
def test_peft_has_nothing_to_warn_of(build: Build) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(build)


# --- off, merged, saved ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS)
def test_switched_off_it_is_the_base_and_then_on_again(build: Build) -> None:
    loaded = adapted(build)
    on, names = logits(loaded), list(trainable(loaded.model))
    with adapter_disabled(loaded):
        assert torch.equal(logits(loaded), logits(as_loaded(build())))
    assert torch.equal(logits(loaded), on)
    assert list(trainable(loaded.model)) == names
    with adapter_disabled(plain := as_loaded(build())):
        assert torch.equal(logits(plain), logits(as_loaded(build())))


@pytest.mark.parametrize("build", MODELS)
def test_merged_it_is_a_plain_model_that_can_be_trained(build: Build) -> None:
    loaded = adapted(build)
    expected = logits(loaded)
    merge_adapter(loaded)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    plain = build()
    assert loaded.adapter is None
    assert [name for name, _ in loaded.model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(trainable(loaded.model)) == [name for name, _ in plain.named_parameters()]
    attach_adapter(loaded, LORA, seed=1)  # and be adapted anew
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", MODELS)
def test_stock_peft_opens_what_is_saved(build: Build, tmp_path: Path) -> None:
    loaded = adapted(build, LORA.model_copy(update={"target_modules": "attention"}))
    save_model(loaded, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == expected
    stock = PeftModel.from_pretrained(build(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, logits(loaded), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", MODELS)
def test_saved_and_loaded_it_computes_the_same(build: Build, tmp_path: Path) -> None:
    base = save_folder(build(), tmp_path / "base")
    loaded = load_model(ModelConfig(name=str(base), device="cpu"))
    attach_adapter(loaded, LORA, seed=0)
    with torch.no_grad():
        for parameter in trainable(loaded.model).values():
            parameter.add_(0.02)
    (tmp_path / "adapter").mkdir()
    save_model(loaded, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )

    config = ModelConfig(name=str(tmp_path / "adapter"), device="cpu")
    kept = load_model(config, adapters="keep")
    assert torch.equal(logits(kept), logits(loaded))
    assert trainable(kept.model).keys() == trainable(loaded.model).keys()
    save_model(kept, tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()

    merged = load_model(config)
    assert merged.adapter is None
    assert (merged.source, merged.origin) == (config.name, config.name)
    torch.testing.assert_close(logits(merged), logits(loaded), atol=1e-5, rtol=1e-5)
    assert load_context_length(config) == 128
    assert load_tokenizer(config).get_vocab() == loaded.tokenizer.get_vocab()
    assert load_skeleton(config).num_parameters() == merged.model.num_parameters()


def test_transformers_opens_it_too(tmp_path: Path) -> None:
    """Its own loader follows base_model_name_or_path."""
    loaded = load_model(ModelConfig(name=str(save_folder(small_gpt2(), tmp_path / "base")), device="cpu"))
    attach_adapter(loaded, LORA, seed=0)
    (tmp_path / "adapter").mkdir()
    save_model(loaded, tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(stock(IDS).logits, logits(loaded))


def test_an_adapter_on_an_adapter(tmp_path: Path) -> None:
    """The lower one is merged; the upper one names it as its base, and both come back in order."""
    base = save_folder(small_llama(), tmp_path / "base")
    expected, place = None, base
    for stage in ("sft", "dpo"):
        loaded = load_model(ModelConfig(name=str(place), device="cpu"))
        attach_adapter(loaded, LORA, seed=0)
        with torch.no_grad():
            for parameter in trainable(loaded.model).values():
                parameter.add_(0.02)
        expected, place = logits(loaded), tmp_path / stage
        place.mkdir()
        save_model(loaded, place)
    assert torch.equal(logits(load_model(ModelConfig(name=str(place), device="cpu"), adapters="keep")), expected)
    torch.testing.assert_close(logits(load_model(ModelConfig(name=str(place), device="cpu"))), expected)


def test_bf16_base_keeps_every_bit_of_the_adapter(tmp_path: Path) -> None:
    config = ModelConfig(name=str(save_folder(small_gpt2(), tmp_path / "base")), device="cpu", precision="bf16-pure")
    loaded = load_model(config)
    attach_adapter(loaded, LORA, seed=0)
    with torch.no_grad():
        for parameter in trainable(loaded.model).values():
            parameter.add_(1e-6)  # below what bf16 resolves
    save_model(loaded, tmp_path)
    kept = load_model(config.at(str(tmp_path)), adapters="keep")
    for name, parameter in trainable(kept.model).items():
        assert torch.equal(parameter, trainable(loaded.model)[name])


def test_the_fingerprint_is_that_of_the_base() -> None:
    plain = small_gpt2()
    loaded = adapted(small_gpt2)
    assert weights_fingerprint(loaded.model) == weights_fingerprint(plain)
    with torch.no_grad():
        loaded.model.transformer.h[0].attn.c_attn.base_layer.bias[0] += 1
    assert weights_fingerprint(loaded.model) != weights_fingerprint(plain)


# --- training -------------------------------------------------------------------------------------------------------


def gradients(loaded: LoadedModel) -> dict[str, Tensor]:
    loaded.model.zero_grad()
    compute_logprobs(loaded, _probe_batch(loaded.model)).sum().backward()
    return {name: p.grad.clone() for name, p in trainable(loaded.model).items() if p.grad is not None}


@pytest.mark.parametrize("build", [small_gpt2, small_llama])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradients_are_those_of_the_merged_weights(build: Build, layout: str) -> None:
    """∂/∂A = s·Bᵀ·∂/∂W and ∂/∂B = s·∂/∂W·Aᵀ, with ∂/∂W from a plain model; whatever the engine's shortcuts."""
    loaded = adapted(build)
    choose_layout(loaded, layout, 16)  # type: ignore[arg-type]
    assert loaded.layout == layout
    found = gradients(loaded)
    assert found.keys() == trainable(loaded.model).keys()
    factors = {name: p.detach().clone() for name, p in trainable(loaded.model).items()}
    merge_adapter(loaded)
    choose_layout(loaded, "padded", 16)
    full = gradients(loaded)
    for name in linear_layers(loaded.model):
        weight = full[f"{name}.weight"].T if loaded.model.config.model_type == "gpt2" else full[f"{name}.weight"]
        a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        torch.testing.assert_close(found[a], 2 * factors[b].T @ weight, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found[b], 2 * weight @ factors[a].T, atol=1e-4, rtol=1e-3)


def still_gpt2() -> PreTrainedModel:
    return small_gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


@pytest.mark.parametrize("build", [still_gpt2, small_llama])
def test_gradient_checkpointing_gives_the_same_gradients(build: Build) -> None:
    plain, checkpointed = adapted(build), adapted(build)
    enable_checkpointing(checkpointed.model)
    for loaded in (plain, checkpointed):
        choose_layout(loaded, "packed", 16)
        loaded.model.train()
    expected, found = gradients(plain), gradients(checkpointed)
    assert len(expected) == len(trainable(plain.model))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_the_engine_sees_the_adapter_switched_off() -> None:
    loaded, plain = adapted(small_llama), as_loaded(small_llama())
    choose_layout(loaded, "packed", 16)
    choose_layout(plain, "packed", 16)
    batch = _probe_batch(plain.model)
    with torch.no_grad():
        on = compute_logprobs(loaded, batch)
        with adapter_disabled(loaded):
            off = compute_logprobs(loaded, batch)
        assert torch.equal(off, compute_logprobs(plain, batch))
        assert not torch.allclose(on, off)


def test_dropout_is_on_in_training_only() -> None:
    loaded = adapted(still_gpt2, LORA.model_copy(update={"lora_dropout": 0.5}))
    choose_layout(loaded, "packed", 16)
    batch = _probe_batch(loaded.model)
    with torch.no_grad():
        assert torch.equal(compute_logprobs(loaded, batch), compute_logprobs(loaded, batch))
        loaded.model.train()
        assert not torch.equal(compute_logprobs(loaded, batch), compute_logprobs(loaded, batch))


# --- which layers ---------------------------------------------------------------------------------------------------


def small_opt() -> PreTrainedModel:
    """Projections outside the blocks, and an MLP that is two layers without a module of their own."""
    config = OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    return OPTForCausalLM(config)


TARGETS = [
    (small_gpt2, "all-linear", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    (small_gpt2, "attention", {"attn.c_attn", "attn.c_proj"}),
    (small_gpt2, "mlp", {"mlp.c_fc", "mlp.c_proj"}),
    (small_gpt2, ("c_attn",), {"attn.c_attn"}),
    (small_gpt2, ("mlp.c_proj", "c_attn"), {"mlp.c_proj", "attn.c_attn"}),
    (small_llama, "attention", {f"self_attn.{x}_proj" for x in "qkvo"}),
    (small_llama, "mlp", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
    (small_llama, r".*\.(q|v)_proj", {"self_attn.q_proj", "self_attn.v_proj"}),
    (small_opt, "attention", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}),
    (small_opt, "mlp", {"fc1", "fc2"}),
]


@pytest.mark.parametrize(("build", "wanted", "expected"), TARGETS)
def test_targets(build: Build, wanted: str | tuple[str, ...], expected: set[str]) -> None:
    """What is adapted, in every block and nowhere else, and what the saved config says to peft."""
    model = build()
    found = find_targets(model, wanted)
    blocks = model.config.num_hidden_layers
    assert len(found) == blocks * len(expected)
    assert {name.split(".0.")[1] for name in found if ".0." in name} == expected
    adapt_skeleton(model, LoRAConfig(r=2, target_modules=wanted))
    assert [name for name, module in model.named_modules() if hasattr(module, "lora_A")] == found


def test_a_pattern_can_choose_a_block() -> None:
    assert find_targets(small_gpt2(), r"transformer\.h\.1\.attn.*") == [
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.attn.c_proj",
    ]


def test_the_saved_names_are_short_where_they_can_be() -> None:
    for wanted, expected in {
        "all-linear": {"c_attn", "c_proj", "c_fc"},
        "mlp": {"mlp.c_fc", "mlp.c_proj"},
        r".*\.1\.attn\.c_attn": {"transformer.h.1.attn.c_attn"},
    }.items():
        loaded = adapted(small_gpt2, LoRAConfig(target_modules=wanted))
        assert loaded.adapter is not None
        assert set(loaded.adapter.peft_config["default"].target_modules) == expected


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (("q_proj",), r"'q_proj' matches no linear layer of GPT2LMHeadModel .*there are c_attn, c_proj, c_fc"),
        (("c_attn", "q_proj"), r"'q_proj' matches no linear layer"),
        (("lm_head",), r"'lm_head' matches no linear layer .*\(its output head is not adapted\)"),
        (("wte",), r"'wte' matches no linear layer"),
        ("c_attn", r"the pattern 'c_attn' matches no linear layer .*in full e\.g\. transformer\.h\.0\.attn\.c_attn"),
    ],
)
def test_targets_that_are_not_there(wanted: str | tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=f"adapter.target_modules: {said}"):
        attach_adapter(as_loaded(small_gpt2()), LoRAConfig(target_modules=wanted), 0)


# --- folders that are refused ---------------------------------------------------------------------------------------


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, file)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"an adapter without adapter_model\.safet"),
    "weights cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"12"),
        r"the adapter cannot be read \(.*\); copy it again",
    ),
    "tensor missing": (
        drop_tensor,
        r"does not fit its base model .* is missing in the file and of shape \[32, 4\] in the m",
    ),
    "other rank": (
        lambda f: edit(f, r=2),
        r"is of shape \[4, \d+\] in the file and of shape \[2, \d+\] in the model \(16 such\)",
    ),
    "other layers": (lambda f: edit(f, target_modules=["q_proj"]), r"does not fit its base model"),
    "other kind": (
        lambda f: edit(f, peft_type="LOHA", target_modules=None),
        r"an adapter of type LOHA, and only LORA, IA3",
    ),
    "other weights": (
        lambda f: edit(f, init_lora_weights="pissa_niter_4"),
        r"stands on other weights than its base model.s \(init_lora_weights: pissa_niter_4\)",
    ),
    "no base": (lambda f: edit(f, base_model_name_or_path=None), r"names no base_model_name_or_path"),
    "base gone": (
        lambda f: edit(f, base_model_name_or_path="/nowhere/base"),
        r"adapter_config\.json: base_model_name_or_path: /nowhere/base does not exist",
    ),
    "its own base": (lambda f: edit(f, base_model_name_or_path=str(f)), r"an adapter whose base model is itself"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json is damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_is_refused(case: str, tmp_path: Path) -> None:
    break_it, message = REFUSED[case]
    loaded = load_model(ModelConfig(name=str(save_folder(small_gpt2(), tmp_path / "base")), device="cpu"))
    attach_adapter(loaded, LORA, seed=0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_model(loaded, folder)
    break_it(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(ModelConfig(name=str(folder), device="cpu"))
    assert "\n" not in str(caught.value)
