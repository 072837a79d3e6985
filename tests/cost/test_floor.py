"""The floor against autograd on a plain computation of only what is needed, counted by torch's own FLOP counter.

The oracle runs a real model's weights, one query at a time, so that exactly the visible (query, key) pairs are
multiplied; which gradients are needed is autograd's own decision. Positions and biases carry no products, and are left
out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from tests.cost.test_flops import gpt2, llama
from tunelab.cost import (
    ModelShape,
    attention_pairs,
    floor_flops,
    floor_formula,
    inference_flops,
    predictor_counts,
    training_flops,
)
from tunelab.types import Batch, Segment


def pair_and_sequence() -> Batch:
    """A prompt of 4 with completions of 3 and 2, and a lone sequence of 5 whose last three tokens carry loss.

    Predictors: the prompt's last position for both completions, then 4, 5 and 7; 10, 11, 12 of [9, 14).
    """
    segments = (Segment(0, 4), Segment(4, 7, 0, 4), Segment(7, 9, 0, 4), Segment(9, 14))
    predictors = torch.tensor([3, 4, 5, 3, 7, 10, 11, 12])
    ids = torch.arange(14)
    sequences = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    return Batch(ids, ids, segments, predictors, ids[predictors], sequences, 3, (0, 1))


def visible(batch: Batch, position: int) -> Tensor:
    segment = next(s for s in batch.segments if s.start <= position < s.stop)
    prefix = torch.arange(segment.prefix_start, segment.prefix_stop)
    return torch.cat([prefix, torch.arange(segment.start, position + 1)])


class Plain:
    """A product with its adapter; `columns` of it, at `rows` of the input."""

    def __init__(self, module: Any, x: Tensor, adapters: bool) -> None:
        base = getattr(module, "base_layer", module)
        self.x, self.weight = x, base.weight if hasattr(base, "nf") else base.weight.T
        adapted = adapters and hasattr(module, "lora_A")
        self.up = module.lora_B["default"].weight.T if adapted else None
        self.xa = x @ module.lora_A["default"].weight.T if adapted else None

    def __call__(self, columns: slice = slice(None), rows: Tensor | slice = slice(None)) -> Tensor:
        out = self.x[rows] @ self.weight[:, columns]
        return out if self.xa is None or self.up is None else out + self.xa[rows] @ self.up[:, columns]


def queries_keys_values(layer: nn.Module, normed: Tensor, rows: Tensor, adapters: bool) -> tuple[Tensor, ...]:
    attention: Any = getattr(layer, "attn", None) or layer.self_attn
    if hasattr(attention, "c_attn"):
        width = normed.shape[1]
        fused = Plain(attention.c_attn, normed, adapters)
        keys, values = fused(slice(width, 3 * width)).split(width, dim=1)
        return fused(slice(0, width), rows), keys, values
    query, key, value = (getattr(attention, f"{name}_proj") for name in "qkv")
    return Plain(query, normed[rows], adapters)(), Plain(key, normed, adapters)(), Plain(value, normed, adapters)()


def attend(batch: Batch, rows: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    size = query.shape[1] // heads
    repeats = query.shape[1] // key.shape[1]

    def by_head(x: Tensor, times: int = 1) -> Tensor:
        return x.reshape(len(x), -1, size).transpose(0, 1).repeat_interleave(times, dim=0)

    query, key, value = by_head(query), by_head(key, repeats), by_head(value, repeats)
    results = []
    for index, position in enumerate(rows.tolist()):
        seen = visible(batch, position)
        scores = torch.bmm(query[:, index : index + 1], key[:, seen].transpose(1, 2))
        results.append(torch.bmm(scores.softmax(-1), value[:, seen]).reshape(1, -1))
    return torch.cat(results)


def plain_block(layer: Any, x: Tensor, batch: Batch, rows: Tensor, heads: int, adapters: bool) -> Tensor:
    is_gpt2 = hasattr(layer, "attn")
    first, second = (layer.ln_1, layer.ln_2) if is_gpt2 else (layer.input_layernorm, layer.post_attention_layernorm)
    attended = attend(batch, rows, *queries_keys_values(layer, first(x), rows, adapters), heads)
    middle = x[rows] + Plain(layer.attn.c_proj if is_gpt2 else layer.self_attn.o_proj, attended, adapters)()
    normed, mlp = second(middle), layer.mlp
    if is_gpt2:
        return middle + Plain(mlp.c_proj, Plain(mlp.c_fc, normed, adapters)().tanh(), adapters)()
    inner = Plain(mlp.gate_proj, normed, adapters)().sigmoid() * Plain(mlp.up_proj, normed, adapters)()
    return middle + Plain(mlp.down_proj, inner, adapters)()


def plain_loss(model: Any, batch: Batch, adapters: bool = True) -> Tensor:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    is_gpt2 = hasattr(base, "transformer")
    layers, norm = (base.transformer.h, base.transformer.ln_f) if is_gpt2 else (base.model.layers, base.model.norm)
    x = base.get_input_embeddings()(batch.input_ids)
    predictors = batch.loss_positions.unique()
    for layer in layers:
        rows = predictors if layer is layers[-1] else torch.arange(batch.num_tokens)
        x = plain_block(layer, x, batch, rows, base.config.num_attention_heads, adapters)
    normed = norm(x)[torch.searchsorted(predictors, batch.loss_positions)]
    logits = normed @ base.get_output_embeddings().weight.T
    return logits.log_softmax(-1).gather(1, batch.targets[:, None]).sum()


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def lora(model: PreTrainedModel, targets: str | list[str]) -> nn.Module:
    fan_in_fan_out = isinstance(model, GPT2LMHeadModel)
    config = peft.LoraConfig(
        r=3, target_modules=targets, fan_in_fan_out=fan_in_fan_out, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # not zero, or there is nothing to tell
            nn.init.normal_(parameter)
    return adapted


def frozen(model: PreTrainedModel, *prefixes: str) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))
    return model


CASES: dict[str, Callable[[], nn.Module]] = {
    "gpt2, full": gpt2,
    "llama, full": llama,
    "llama tied, full": lambda: llama(tied=True),
    "gpt2, lora on everything": lambda: lora(gpt2(), "all-linear"),
    "llama, lora on everything": lambda: lora(llama(), "all-linear"),
    "gpt2, lora on attention": lambda: lora(gpt2(), ["c_attn"]),
    "llama, lora on queries and values": lambda: lora(llama(), ["q_proj", "v_proj"]),
    "llama, lora on values": lambda: lora(llama(), ["v_proj"]),
    "llama, lora on the output": lambda: lora(llama(), ["o_proj"]),
    "llama, lora on the last MLP product": lambda: lora(llama(), ["down_proj"]),
    "gpt2, lora on the MLP": lambda: lora(gpt2(), ["c_fc"]),
    "gpt2, embeddings and first two blocks frozen": lambda: frozen(
        gpt2(), "transformer.w", "transformer.h.0", "transformer.h.1"
    ),
    "llama, head frozen": lambda: frozen(llama(), "lm_head"),
    "llama, head alone": lambda: frozen(llama(), "model"),
    "llama, first block but its norms frozen": lambda: frozen(
        llama(), "model.embed", "model.layers.0.self_attn", "model.layers.0.mlp"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_training_against_autograd(name: str) -> None:
    model, batch = CASES[name](), pair_and_sequence()
    assert floor_flops(ModelShape.of(model), batch) == counted(lambda: plain_loss(model, batch).backward())


@pytest.mark.parametrize("name", ["gpt2, full", "llama, lora on everything", "gpt2, lora on attention"])
def test_passes_without_gradients(name: str) -> None:
    model, batch = CASES[name](), pair_and_sequence()
    shape = ModelShape.of(model)
    with torch.no_grad():
        assert floor_flops(shape, batch, "inference") == counted(lambda: plain_loss(model, batch))
        assert floor_flops(shape, batch, "reference") == counted(lambda: plain_loss(model, batch, adapters=False))


@pytest.mark.parametrize("family", [gpt2, llama])
def test_lora_forecast_before_it_is_built(family: Callable[[], PreTrainedModel]) -> None:
    assert ModelShape.of(family()).with_lora(3) == ModelShape.of(lora(family(), "all-linear"))


def test_predictors_by_hand() -> None:
    """U = 7 of S = 8. Pairs: 4 at the prompt's end; 5, 6 and 5 behind it; 2, 3 and 4 in the lone sequence."""
    assert predictor_counts(pair_and_sequence()) == (7, 4 + 5 + 6 + 5 + 2 + 3 + 4)


def test_a_preference_pair_of_gpt2_small_by_the_issues_formula() -> None:
    """6·N_b·(P + C₁ + C₂) + 6·V·d·(C₁ + C₂) + attention, less the last block's 10d² a token that predicts nothing, and
    the pairs of those queries. P = 138, C₁ = 58, C₂ = 44; the reference a third of it."""
    with torch.device("meta"):
        shape = ModelShape.of(GPT2LMHeadModel(GPT2Config()))
    segments = (Segment(0, 138), Segment(138, 196, 0, 138), Segment(196, 240, 0, 138))
    positions = torch.tensor([137, *range(138, 195), 137, *range(196, 239)])
    ids = torch.zeros(240, dtype=torch.int64)
    batch = Batch(ids, ids, segments, positions, positions, positions, 2, (0,))

    predictors = 57 + 43 + 1
    pairs = 138 * 139 // 2 + 58 * 59 // 2 + 58 * 138 + 44 * 45 // 2 + 44 * 138
    seen = 138 + sum(range(139, 139 + 57)) + sum(range(139, 139 + 43))
    whole = 6 * 84_934_656 * 240 + 6 * 50_257 * 768 * 102 + 12 * 768 * 12 * pairs
    left_out = 6 * 10 * 768**2 * (240 - predictors) + 12 * 768 * (pairs - seen)
    assert floor_flops(shape, batch) == whole - left_out
    assert 3 * floor_flops(shape, batch, "reference") == whole - left_out
    assert whole == training_flops(shape, 240, 102, attention_pairs(batch))


def test_blocks_of_unknown_make_are_counted_whole() -> None:
    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    shape, batch = ModelShape.of(GPTNeoXForCausalLM(config)), pair_and_sequence()
    counts = batch.num_tokens, len(batch.targets), attention_pairs(batch)
    assert not any(block.is_known for block in shape.blocks)
    assert floor_flops(shape, batch) == training_flops(shape, *counts)
    assert floor_flops(shape, batch, "inference") == inference_flops(shape, *counts)


def test_a_frozen_model_has_no_backward_pass() -> None:
    model = gpt2().requires_grad_(False)
    assert floor_formula(ModelShape.of(model)) == floor_formula(ModelShape.of(gpt2()), "inference")
