"""Every kind of adapter the suites run over, small. A new kind is a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from tests.models.small_models import small_gpt2, small_llama
from tunelab.config.adapters import (
    AdapterConfig,
    IA3Config,
    LoRAConfig,
    PartialConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    PTuningV2Config,
)
from tunelab.models.adapters.targets import linear_layers, weight_shape

R = 4


def gpt2() -> PreTrainedModel:
    """Without dropout, and a row of weights is one block of 4-bit scales."""
    return small_gpt2(n_embd=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


def llama() -> PreTrainedModel:
    return small_llama(hidden_size=64, intermediate_size=96)


BUILDS: dict[str, Callable[[], PreTrainedModel]] = {"gpt2": gpt2, "llama": llama}


@dataclass(frozen=True)
class Kind:
    """start: how near to the base a new adapter is. merges: whether it can become weights. fused: whether the blocks
    are the fused ones with it. four_bit: its base is quantised. count: trainable parameters by the paper's formula, of
    a model without it.
    """

    name: str
    config: AdapterConfig
    count: Callable[[PreTrainedModel], int]
    start: Literal["bits", "rounding", "elsewhere"] = "bits"
    merges: bool = True
    fused: bool = True
    four_bit: bool = False
    builds: tuple[str, ...] = ("gpt2", "llama")


def low_rank(r: int = R, bias: bool = False, lengths: bool = False) -> Callable[[PreTrainedModel], int]:
    """r·(in + out) a layer (Hu et al. 2021, sec. 4.1), `out` more for a bias on B or DoRA's m."""

    def count(model: PreTrainedModel) -> int:
        shapes = [weight_shape(layer) for layer in linear_layers(model).values()]
        return sum(r * (outputs + inputs) + (bias + lengths) * outputs for outputs, inputs in shapes)

    return count


def ia3_count(model: PreTrainedModel) -> int:
    """l_k, l_v and l_ff (Liu et al. 2022, sec. 3.3) in every block; GPT-2's queries are in one matrix with them."""
    config = model.config
    if config.model_type == "gpt2":
        return config.num_hidden_layers * (3 * config.n_embd + 4 * config.n_embd)
    keys = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * (2 * keys + config.intermediate_size)


def lora(**changes: object) -> LoRAConfig:
    return LoRAConfig(**({"r": R, "lora_alpha": 8} | changes))


LAYERWISE = [
    Kind("lora", lora(), low_rank()),
    Kind("gaussian", lora(init_lora_weights="gaussian"), low_rank()),
    Kind("rslora", lora(use_rslora=True), low_rank()),
    Kind("bias", lora(lora_bias=True), low_rank(bias=True), builds=("gpt2",)),
    Kind("dropout", lora(lora_dropout=0.3), low_rank(), fused=False),
    Kind("loraplus", lora(loraplus_lr_ratio=16.0), low_rank()),
    Kind("pissa", lora(init_lora_weights="pissa"), low_rank(), start="rounding"),
    Kind("pissa in rounds, rslora", lora(init_lora_weights="pissa_niter_4", use_rslora=True), low_rank(),
         start="rounding"),
    Kind("pissa, bias", lora(init_lora_weights="pissa", lora_bias=True), low_rank(bias=True), start="rounding",
         builds=("gpt2",)),
    Kind("dora", lora(use_dora=True), low_rank(lengths=True), start="rounding"),
    Kind("dora, rslora", lora(use_dora=True, use_rslora=True), low_rank(lengths=True), start="rounding"),
    Kind("ia3", IA3Config(), ia3_count, fused=False),
    Kind("qlora", lora(), low_rank(), four_bit=True),
    Kind("qlora, bias", lora(lora_bias=True), low_rank(bias=True), four_bit=True, builds=("gpt2",)),
    Kind("qdora", lora(use_dora=True), low_rank(lengths=True), start="rounding", four_bit=True),
    Kind("ia3 on 4 bits", IA3Config(), ia3_count, fused=False, four_bit=True),
]  # fmt: skip
"""New weights beside, or factors on, the model's own layers."""

VIRTUAL: dict[str, AdapterConfig] = {
    "prefix_tuning": PrefixTuningConfig(num_virtual_tokens=3, encoder_hidden_size=12),
    "prefix_tuning_plain": PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=False),
    "p_tuning_v2": PTuningV2Config(num_virtual_tokens=5),
    "prompt_tuning": PromptTuningConfig(num_virtual_tokens=4),
    "prompt_tuning_vocab": PromptTuningConfig(num_virtual_tokens=1, prompt_tuning_init="sample_vocab"),
    "prompt_tuning_text": PromptTuningConfig(
        num_virtual_tokens=7, prompt_tuning_init="text", prompt_tuning_init_text="Answer truthfully:"
    ),
    "p_tuning_mlp": PTuningConfig(num_virtual_tokens=4, encoder_hidden_size=8),
    "p_tuning_lstm": PTuningConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="lstm", encoder_num_layers=2
    ),
}
"""Virtual tokens before every sequence: nothing to merge, and no identity at the start."""

PARTIAL: dict[str, AdapterConfig] = {
    "partial_last": PartialConfig(last_layers=1),
    "partial_biases": PartialConfig(biases=True),
}
"""A part of the model's own weights: a checkpoint is a whole model."""


def virtual_count(config: Any) -> Callable[[PreTrainedModel], int]:
    """V·D embeddings; V·2·L·H_kv·K keys and values; or the parameters of what computes them (peft's encoders)."""

    def count(model: PreTrainedModel) -> int:
        own = model.config
        heads = own.num_attention_heads
        v, d, layers = config.num_virtual_tokens, own.hidden_size, own.num_hidden_layers
        kv = d // heads * getattr(own, "num_key_value_heads", heads)
        match config:
            case PromptTuningConfig():
                return v * d
            case PTuningV2Config() | PrefixTuningConfig(prefix_projection=False):
                return v * 2 * layers * kv
            case PrefixTuningConfig():
                h = config.encoder_hidden_size
                return v * kv + (kv + 1) * h + (h + 1) * 2 * layers * kv
            case PTuningConfig(encoder_reparameterization_type="mlp"):
                h = config.encoder_hidden_size
                return v * d + (d + 1) * h + (h + 1) * h + (h + 1) * d
            case _:
                h = config.encoder_hidden_size
                head = (2 * h + 1) * 2 * h + (2 * h + 1) * d
                # Two directions; four gates, each with weights of the input and of the state, and two biases.
                inputs = [d, *[2 * h] * (config.encoder_num_layers - 1)]
                return v * d + head + sum(2 * 4 * h * (size + h + 2) for size in inputs)

    return count


KINDS = [
    *LAYERWISE,
    *(Kind(name, config, virtual_count(config), start="elsewhere", merges=False) for name, config in VIRTUAL.items()),
    *(
        Kind(
            f"{name} on 4 bits",
            VIRTUAL[name],
            virtual_count(VIRTUAL[name]),
            start="elsewhere",
            merges=False,
            four_bit=True,
        )
        for name in ("prefix_tuning", "prompt_tuning")
    ),
]
"""All of which peft makes; what `PARTIAL` trains can be neither switched off nor merged."""
