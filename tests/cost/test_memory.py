"""The memory floor against counts by hand."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from tests.cost.test_flops import gpt2, llama
from tunelab.cost import MemoryFloor, ModelShape, floor_memory


def test_gpt2_small_by_hand() -> None:
    """124 439 808 float32 parameters, AdamW; 2,000 tokens, 700 predictors; a token and block saves x, qkv, attention's
    output, the middle and the MLP's 4d: 10d numbers and 12 log-sum-exps; the last keeps 3d at every token."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == 124_439_808
    floor = floor_memory(
        ModelShape.of(model),
        parameters=parameters,
        trainable=parameters,
        tokens=2000,
        predictors=700,
        chunk_size=512,
    )
    blocks = 11 * 2000 * (10 * 768 + 12)
    last = 2000 * 3 * 768 + 700 * (7 * 768 + 12)
    assert floor == MemoryFloor(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=8 * parameters,
        activations=4 * (blocks + last + 700 * 768),
        logits=512 * 50_257 * 4,
    )
    assert floor.total == 16 * parameters + floor.activations + floor.logits


def test_adapters_in_half_precision_by_hand() -> None:
    """Llama of 2 layers: D = 32, queries 48 wide, keys and values 24 each, gate and up 40 each, 4 heads; rank 3 beside
    7 products. 100 tokens, 30 predictors. Frozen weights of 2 bytes, adapters of 4, activations of 2."""
    floor = floor_memory(
        ModelShape.of(llama()).with_lora(3),
        parameters=1000,
        trainable=10,
        tokens=100,
        predictors=30,
        chunk_size=64,
        weight_bytes=2,
        activation_bytes=2,
    )
    first = 100 * ((32 + 48) + (48 + 48 + 32 + 80) + 7 * 3) * 2 + 100 * 4 * 4
    last = (100 * (32 + 48 + 2 * 3) + 30 * (48 + 48 + 32 + 80 + 5 * 3)) * 2 + 30 * 4 * 4
    assert floor == MemoryFloor(
        weights=990 * 2 + 10 * 4,
        gradients=40,
        optimizer=80,
        activations=first + last + 30 * 32 * 2,
        logits=30 * 50 * 4,  # fewer positions than a chunk has rows
    )


def test_optimizers_without_state_have_none() -> None:
    sizes = {"parameters": 100, "trainable": 100, "tokens": 10, "predictors": 5, "chunk_size": 4}
    floor = floor_memory(ModelShape.of(gpt2()), **sizes, optimizer_slots=0)
    assert (floor.optimizer, floor.gradients) == (0, 400)


def test_blocks_of_unknown_make_save_every_products_output() -> None:
    """GPT-NeoX, D = 32: x, the fused 96, the output 32, the MLP's 64 and 32: 256 a token and block, twice."""
    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    shape = ModelShape.of(GPTNeoXForCausalLM(config))
    floor = floor_memory(shape, parameters=0, trainable=0, tokens=10, predictors=5, chunk_size=4)
    assert floor.activations == 4 * (2 * 10 * (32 + 96 + 32 + 64 + 32) + 5 * 32)
