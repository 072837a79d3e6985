"""The moments of a run's memory against counts by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tests.cost.test_flops import llama
from tunelab.cost import Items, ModelShape, Moment, Row, Training, Workload, memory_moments, peak, read_weights

T, Q, S = 100, 40, 36
ROW = Row(tokens=T, kept=Q, loss_positions=S, sequences=4, longest=30)
F32, BF16 = Items(4, 4), Items(4, 2)


def gpt2() -> PreTrainedModel:
    """Two blocks of D = 32, a vocabulary of 50, tied."""
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16))


def training(model: PreTrainedModel, items: Items = F32, **changes: object) -> Training:
    weights = read_weights(model, itemsize=4, added_itemsize=4, base={id(p) for p in model.parameters()})
    total = sum(w.bytes for w in weights if w.trained)
    options: dict = {"path": "fused", "optimizer": 2 * total} | changes
    return Training(ModelShape.of(model), weights, items, **options)


def workload(micro_batches: int = 1, **changes: object) -> Workload:
    options: dict = {"chunk_size": 16} | changes
    return Workload([ROW], micro_batches, **options)


def named(moments: Sequence[Moment], name: str) -> Moment:
    return next(moment for moment in moments if moment.name == name)


BLOCK = 12 * 32 * 32 + 13 * 32
"""Numbers of a block of GPT-2: 12D² in matrices, 9D in biases, 4D in norms."""
EMBEDDING = 50 * 32
PARAMETERS = 2 * BLOCK + EMBEDDING + 16 * 32 + 2 * 32


def test_gpt2_at_its_head() -> None:
    """Kept: 10D at T in the first block; x and qkv, 4D, at T and 6D at Q in the last. A chunk of at most 16 of the 36
    positions, so 12, and a row to spare. The head's gradient stands alone."""
    parts = named(memory_moments(training(gpt2()), workload()), "head").parts
    kept = 10 * 32 * T + 4 * 32 * T + 6 * 32 * Q
    assert parts["activations"] == 4 * (kept + 3 * S * 32)
    assert parts["logits"] == 4 * 13 * 50
    assert parts["gradients"] == 4 * EMBEDDING
    assert parts["weights"] == 4 * PARAMETERS
    assert parts["optimizer"] == 8 * PARAMETERS


def test_gpt2_in_its_blocks() -> None:
    """The last block's MLP takes activation and gradient, 2·4D, and the gradient of its result, D, at Q."""
    moments = memory_moments(training(gpt2()), workload())
    last = named(moments, "block 2, mlp").parts
    kept = 10 * 32 * T + 4 * 32 * T + 6 * 32 * Q
    assert last["activations"] == 4 * (kept + 9 * 32 * Q)
    assert last["gradients"] == 4 * (EMBEDDING + BLOCK // 2)
    first = named(moments, "block 1, mlp").parts
    assert first["activations"] == 4 * (10 * 32 * T + 9 * 32 * T)
    assert first["gradients"] == 4 * (EMBEDDING + BLOCK + BLOCK // 2)


def test_llama_in_bf16_by_hand() -> None:
    """D = 32, queries 48 wide, keys and values 24 each, gate and up 40 each; residual float32, products bf16."""
    parts = named(memory_moments(training(llama(), BF16), workload()), "block 1, mlp").parts
    kept = T * (32 * 4 + 96 * 2 + 48 * 2 + 32 * 4 + 80 * 2)
    assert parts["activations"] == kept + T * (4 * 40 * 2 + 32 * (4 + 2))
    assert parts["copies"] == 48 * 32 * 2, "the largest matrix of a block, that of the queries, in bf16"


def test_checkpointing_keeps_the_inputs_of_blocks() -> None:
    parts = named(memory_moments(training(gpt2(), checkpointing=True), workload()), "block 2, mlp").parts
    block = 4 * 32 * T + 6 * 32 * Q
    assert parts["activations"] == 4 * (32 * T + block + 9 * 32 * Q)


def test_accumulation_has_every_gradient_and_the_heads_twice() -> None:
    """The tied embedding's new gradient waits for the last of the backward pass beside the one it is added to."""
    moments = memory_moments(training(gpt2()), workload(micro_batches=2))
    assert named(moments, "block 2, mlp").parts["gradients"] == 4 * (PARAMETERS + EMBEDDING + BLOCK // 2)
    assert named(moments, "update").parts["gradients"] == 4 * PARAMETERS


def test_released_gradients_do_not_stand_together() -> None:
    moments = memory_moments(training(gpt2(), release=True), workload())
    assert named(moments, "update").parts["gradients"] == 0
    assert named(moments, "block 1, attention").parts["gradients"] == 4 * (EMBEDDING + BLOCK)


def test_what_lies_below_the_first_trained_block_is_not_kept() -> None:
    model = gpt2()
    model.requires_grad_(False)
    model.transformer.h[1].requires_grad_(True)
    moments = memory_moments(training(model), workload())
    assert not any(moment.name.startswith("block 1") for moment in moments)
    assert named(moments, "head").parts["activations"] == 4 * (4 * 32 * T + 6 * 32 * Q + 3 * S * 32)


def test_four_bits_by_hand() -> None:
    """Half a byte a number and a float32 scale every 64 of the matrices of the blocks; all else as it was."""
    model = gpt2()
    model.requires_grad_(False)
    base = {id(p) for p in model.parameters()}
    weights = read_weights(
        model, itemsize=4, added_itemsize=4, base=base, packed_bytes=lambda numel: numel // 2 + numel // 16
    )
    matrices = 2 * 12 * 32 * 32
    assert sum(w.bytes for w in weights) == matrices // 2 + matrices // 16 + 4 * (PARAMETERS - matrices)


def test_padded_rows_have_whole_logits() -> None:
    """4 sequences of 30 positions: their logits, and those of the 36 targets twice."""
    parts = named(memory_moments(training(gpt2(), path="padded"), workload()), "head").parts
    assert parts["logits"] == 4 * 50 * (4 * 30 + 2 * S)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_peak_is_the_fullest_moment(on_cpu: bool) -> None:
    moments = memory_moments(training(gpt2(), on_cpu=on_cpu, framework=1000), workload())
    assert peak(moments).total == max(sum(moment.parts.values()) for moment in moments)
    assert all((moment.parts.get("allocator", 0) > 0) == (on_cpu and moment.name != "start") for moment in moments)


def test_dora_keeps_every_output() -> None:
    """GPT-2's products put out 3D, D, 4D and D; rank 2 beside each."""
    from peft import LoraConfig, get_peft_model

    kept = {}
    for dora in (False, True):
        model = gpt2()
        targets = ["c_attn", "c_proj", "c_fc"]
        get_peft_model(model, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True, use_dora=dora))
        kept[dora] = named(memory_moments(training(model), workload()), "block 1, mlp").parts["activations"]
    assert kept[True] - kept[False] == 4 * 9 * 32 * T
