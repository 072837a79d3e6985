"""Our FLOPs against torch's own counter, on the plain models, full and with LoRA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tunelab.cost import ModelShape, floor_formula, training_flops

TOKENS = 48


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=199, n_embd=32, n_layer=3, n_head=4, n_positions=64, attn_implementation="eager")
    )


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=199,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="eager",
        )
    )


def counted(model: PreTrainedModel) -> int:
    """Forward and backward pass over one sequence with a target at every position; attention in full squares."""
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("build", [gpt2, llama])
def test_full_training(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    shape = ModelShape.of(model)
    assert training_flops(shape, TOKENS, TOKENS, TOKENS**2) == pytest.approx(counted(model), rel=0.01)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_lora(build: Callable[[], PreTrainedModel], rank: int) -> None:
    """The unavoidable FLOPs, of a row whose every position predicts: nothing of the last block can be left out then."""
    model = build()
    targets = ["c_attn", "c_proj", "c_fc"] if build is gpt2 else "all-linear"
    adapted = get_peft_model(
        model, LoraConfig(r=rank, target_modules=targets, fan_in_fan_out=build is gpt2, init_lora_weights=False)
    )
    formula = floor_formula(ModelShape.of(model))
    ours = (formula.per_token + formula.per_predictor + formula.per_loss_position) * TOKENS
    ours += (formula.per_pair + formula.per_predictor_pair) * TOKENS**2
    del adapted
    assert ours == pytest.approx(counted(model), rel=0.01)
