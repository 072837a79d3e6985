"""From a recipe's adapter to peft's: initial values, learning-rate groups and layers against peft's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config as PeftIA3Config
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import BertConfig, BertLMHeadModel, FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

from tests.models.adapter_kinds import gpt2, llama, lora
from tests.models.small_models import as_loaded, save_folder
from tunelab.config import AdamWConfig, LoRAConfig, ModelConfig
from tunelab.config.adapters import IA3Config
from tunelab.errors import ConfigError
from tunelab.models.adapters import adapter_disabled, attach_adapter, find_targets, learning_rate_scales
from tunelab.models.engine import choose_layout
from tunelab.models.loading import load_model
from tunelab.models.saving import save_model
from tunelab.optim import Updates, build_optimizer

IDS = torch.tensor([[5, 9, 700, 3, 41, 8]])


def bert() -> BertLMHeadModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1024,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        is_decoder=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return BertLMHeadModel(config).eval()


# --- PiSSA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_32"])
def test_pissa_takes_out_the_largest_directions(build: object, init: str) -> None:
    """W_res + s·B·A = W; with exact SVD, A, B and W_res are peft's."""
    plain, loaded = build(), as_loaded(build())  # type: ignore[operator]
    attach_adapter(loaded, lora(init_lora_weights=init), seed=0)
    stock = build()  # type: ignore[operator]
    targets = find_targets(stock, "all-linear")
    kept = json.loads(json.dumps(targets))
    get_peft_model(stock, LoraConfig(r=4, lora_alpha=8, target_modules=kept, init_lora_weights="pissa"))
    for name in targets:
        layer, theirs = loaded.model.get_submodule(name), stock.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rest, weight = layer.base_layer.weight, plain.get_submodule(name).weight
        update = 2 * b @ a
        torch.testing.assert_close(rest + (update.T if hasattr(layer.base_layer, "nf") else update), weight)
        singular = torch.linalg.svdvals(weight)
        found = torch.linalg.svdvals(update)[:4]
        torch.testing.assert_close(found, singular[:4], rtol=1e-4 if init == "pissa" else 0.05, atol=0.0)
        if init == "pissa":
            assert torch.equal(a, theirs.lora_A["default"].weight)
            assert torch.equal(b, theirs.lora_B["default"].weight)
            assert torch.equal(rest, theirs.base_layer.weight)


def test_what_is_saved_is_peft_s_own_conversion(tmp_path: Path) -> None:
    loaded = as_loaded(llama())
    attach_adapter(loaded, lora(init_lora_weights="pissa"), seed=0)
    stock = get_peft_model(
        llama(), LoraConfig(r=4, lora_alpha=8, target_modules=find_targets(llama(), "all-linear"),
                            init_lora_weights="pissa", task_type="CAUSAL_LM")
    )  # fmt: skip
    stock.peft_config["default"].init_lora_weights = True  # as peft's guide has it, before saving the start
    stock.save_pretrained(tmp_path / "start")
    stock.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for model in (loaded.model, stock):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    stock.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    (tmp_path / "ours").mkdir()
    save_model(loaded, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora"):
        assert configs[0][key] == configs[1][key], key


def test_pissa_on_bf16_weights_starts_where_they_are(tmp_path: Path) -> None:
    """A and B keep float32: what is off is the residual's own rounding."""
    config = ModelConfig(name=str(save_folder(llama(), tmp_path / "base")), device="cpu", precision="bf16-pure")
    loaded, plain = load_model(config), load_model(config)
    attach_adapter(loaded, lora(init_lora_weights="pissa"), seed=0)
    for name in find_targets(plain.model, "all-linear"):
        layer, weight = loaded.model.get_submodule(name), plain.model.get_submodule(name).weight
        update = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert update.dtype == torch.float32
        error = (layer.base_layer.weight.float() + update - weight.float()).abs()
        assert (error <= layer.base_layer.weight.float().abs() * 2**-8 + 1e-6).all()
    with torch.no_grad():
        on = loaded.model(IDS).logits
        with adapter_disabled(loaded):
            assert torch.equal(loaded.model(IDS).logits, on), "not trained yet: the start is the reference"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lora(init_lora_weights="pissa", r=65), r"adapter\.r: 65 singular directions are more than .* has \(64\)"),
        (lora(init_lora_weights="pissa", use_dora=True), r"adapter\.use_dora: DoRA and PiSSA do not combine"),
        (lora(use_dora=True, ephemeral_gpu_offload=True), r"adapter\.ephemeral_gpu_offload: there is no CUDA"),
        (IA3Config(target_modules=("c_attn",), feedforward_modules=("c_fc",)),
         r"adapter\.feedforward_modules: .*c_fc is none of adapter\.target_modules"),
        (IA3Config(target_modules=("c_attn",), feedforward_modules=("w2",)),
         r"adapter\.feedforward_modules: 'w2' matches no linear layer"),
    ],
)  # fmt: skip
def test_what_does_not_combine(config: LoRAConfig, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=said):
        attach_adapter(as_loaded(gpt2()), config, seed=0)


def test_a_bias_on_b_needs_one_to_be_merged_into() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.lora_bias: .*q_proj has no bias .*\(14 of 14 target modules"):
        attach_adapter(as_loaded(llama()), lora(lora_bias=True), seed=0)


# --- LoRA+ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_loraplus_groups_are_peft_s(changes: dict) -> None:
    config = lora(loraplus_lr_ratio=16.0, **changes)
    loaded = as_loaded(gpt2())
    attach_adapter(loaded, config, seed=0)
    optimizer = build_optimizer(
        loaded.named_parameters(), AdamWConfig(learning_rate=1e-3), "cpu",
        learning_rate_scales=learning_rate_scales(loaded.model, config),
    )  # fmt: skip
    Updates(optimizer).begin(0, 0.5)
    theirs = create_loraplus_optimizer(loaded.adapter, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=16.0)
    rates = [
        {id(p): group["lr"] for group in found.param_groups for p in group["params"]} for found in (optimizer, theirs)
    ]
    assert rates[0] == rates[1]
    assert set(rates[0].values()) == {0.5, 8.0}
    assert learning_rate_scales(loaded.model, lora()) == {}


# --- IA3 and its layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [gpt2, llama, bert])
def test_ia3_takes_peft_s_layers(build: object) -> None:
    loaded, stock = as_loaded(build()), build()  # type: ignore[operator]
    attach_adapter(loaded, IA3Config(), seed=0)
    get_peft_model(stock, PeftIA3Config(task_type="CAUSAL_LM"))
    found = [
        {name: module.is_feedforward for name, module in model.named_modules() if hasattr(module, "ia3_l")}
        for model in (loaded.model, stock)
    ]
    assert found[0] == found[1]
    assert any(found[0].values())
    assert not all(found[0].values())


def test_ia3_by_pattern_and_preset(tmp_path: Path) -> None:
    """Names that peft would take too widely (it compares endings without a dot) are written in full."""
    loaded = load_model(ModelConfig(name=str(save_folder(bert(), tmp_path / "base")), device="cpu"))
    inner = r".*\d\.output\.dense"
    attach_adapter(loaded, IA3Config(target_modules=r".*(key|value|output\.dense)", feedforward_modules=inner), seed=0)
    fed = [n for n, m in loaded.model.named_modules() if hasattr(m, "ia3_l") and m.is_feedforward]
    assert fed == [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    (tmp_path / "adapter").mkdir()
    save_model(loaded, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, loaded.model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_ia3_says_where_peft_knows_no_layers() -> None:
    config = OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    model = OPTForCausalLM(config)
    model.config.model_type = "something"
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: peft names no IA3 layers for .* something"):
        attach_adapter(as_loaded(model), IA3Config(), seed=0)


def falcon() -> FalconForCausalLM:
    config = FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    return FalconForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "wanted", "expected"),
    [
        (bert, "attention", {"attention.self.query", "attention.self.key", "attention.self.value",
                             "attention.output.dense"}),
        (bert, "mlp", {"intermediate.dense", "output.dense"}),
        (bert, ("output.dense",), {"attention.output.dense", "output.dense"}),
        (falcon, "attention", {"self_attention.query_key_value", "self_attention.dense"}),
        (falcon, "mlp", {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    ],
)  # fmt: skip
def test_targets_of_other_architectures(build: object, wanted: str | tuple[str, ...], expected: set[str]) -> None:
    """What is found, and what the saved names mean to peft."""
    model = build()  # type: ignore[operator]
    found = find_targets(model, wanted)
    assert {name.split(".0.", 1)[1] for name in found if ".0." in name} == expected
    loaded = as_loaded(model)
    attach_adapter(loaded, lora(target_modules=wanted), seed=0)
    assert [name for name, module in loaded.model.named_modules() if hasattr(module, "lora_A")] == found


def test_a_preset_that_matches_nothing_lists_what_is_there() -> None:
    model = falcon()
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: 'q_proj' matches .*there are query_key_value"):
        find_targets(model, ("q_proj",))
    for name in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
        model.transformer.h[0].set_submodule(name, torch.nn.Identity())
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: mlp matches no linear layer of FalconForCausalLM"):
        find_targets(model, "mlp")


def test_why_blocks_are_not_fused() -> None:
    for config, said in [(lora(lora_dropout=0.1), "its adapter has dropout"), (IA3Config(), "its adapter is IA3")]:
        loaded = as_loaded(gpt2())
        attach_adapter(loaded, config, seed=0)
        choose_layout(loaded, "packed", 16)
        assert said in loaded.blocks_reason
