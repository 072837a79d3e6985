"""The FLOP formulas against torch's own counter on real modules, and against arithmetic by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tunelab.cost import (
    Block,
    ModelShape,
    Projection,
    attention_pairs,
    classic_training_flops,
    inference_flops,
    training_flops,
)
from tunelab.types import Batch, Segment

TOKENS = 12


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=16, attn_implementation="eager")
    return GPT2LMHeadModel(config)


def llama(tied: bool = False) -> PreTrainedModel:
    """Grouped queries, a head size that is not D / heads, a gated MLP, untied embeddings."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS = {"gpt2": gpt2, "llama": llama, "llama tied": lambda: llama(tied=True)}


def test_shape_of_gpt2() -> None:
    """A block is 3D² + D² + 4D² + 4D² = 12D²; 3 layers of D = 32: 36 864."""
    shape = ModelShape.of(gpt2())
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size, shape.attention_width) == (3, 32, 50, 32)
    assert shape.block_matmul_parameters == 12 * 3 * 32**2
    assert shape.blocks[0].projections == (
        Projection(32, (("query", 32), ("key", 32), ("value", 32))),
        Projection(32, (("output", 32),)),
        Projection(32, (("mlp_in", 128),)),
        Projection(128, (("mlp_out", 32),)),
    )


def test_shape_of_gpt2_small() -> None:
    """The 124M model: 12 · 12 · 768² = 84 934 656 weights in the blocks."""
    with torch.device("meta"):
        shape = ModelShape.of(GPT2LMHeadModel(GPT2Config()))
    assert shape.block_matmul_parameters == 84_934_656
    assert (shape.vocab_size, shape.hidden_size, shape.attention_width) == (50_257, 768, 768)


def test_shape_of_llama() -> None:
    """q 32·48, k and v 32·24 each, o 48·32, three of 32·40: 1536 + 768 + 768 + 1536 + 3840 = 8448, twice."""
    shape = ModelShape.of(llama())
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size, shape.attention_width) == (2, 32, 50, 48)
    assert shape.block_matmul_parameters == 2 * 8448
    assert [(p.in_features, p.outputs) for p in shape.blocks[1].projections] == [
        (32, (("query", 48),)),
        (32, (("key", 24),)),
        (32, (("value", 24),)),
        (48, (("output", 32),)),
        (32, (("mlp_in", 40),)),
        (32, (("mlp_in", 40),)),
        (40, (("mlp_out", 32),)),
    ]


def rotary_angles(model: PreTrainedModel) -> int:
    """transformers 5.17 makes position × frequency by a matrix product, later releases do not."""
    if isinstance(model, GPT2LMHeadModel):
        return 0
    with FlopCounterMode(display=False) as counter:
        model.model.rotary_emb(torch.zeros(1, TOKENS, 32), torch.arange(TOKENS)[None])
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_against_torchs_counter(name: str) -> None:
    """Equal to the last operation, with the counts of this plain pass: every position projected, and all T² pairs
    computed, those above the diagonal too (masked after the product)."""
    model = MODELS[name]()
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=ids, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()

    shape = ModelShape.of(model)
    counted = forward.get_total_flops() - rotary_angles(model), backward.get_total_flops()
    assert counted[0] == inference_flops(shape, TOKENS, TOKENS, TOKENS**2)
    assert sum(counted) == training_flops(shape, TOKENS, TOKENS, TOKENS**2)


@pytest.mark.parametrize("name", MODELS)
def test_projecting_loss_positions_only(name: str) -> None:
    """transformers' `logits_to_keep` saves exactly the formula's term: 2 · V · D for each position left out."""
    model = MODELS[name]()
    totals = []
    for keep in (TOKENS, 5):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.arange(TOKENS)[None], use_cache=False, logits_to_keep=keep)
        totals.append(counter.get_total_flops())
    shape = ModelShape.of(model)
    formula = [inference_flops(shape, TOKENS, keep, TOKENS**2) for keep in (TOKENS, 5)]
    assert totals[0] - totals[1] == formula[0] - formula[1] == 2 * 50 * 32 * (TOKENS - 5)


def test_terms_by_hand() -> None:
    """L = 2, D = 4, V = 10, N_b = 100, width 6; T = 7, S = 3, A = 20.

    Forward 2·100·7 + 2·10·4·3 + 4·6·2·20 = 1400 + 240 + 960 = 2600; training three times that.
    """
    block = Block((Projection(5, (("other", 10),)),))
    shape = ModelShape((block, block), head=Projection(4, (("other", 10),)), num_heads=2, attention_width=6)
    assert inference_flops(shape, tokens=7, loss_positions=3, attention_pairs=20) == 2600
    assert training_flops(shape, tokens=7, loss_positions=3, attention_pairs=20) == 7800
    assert classic_training_flops(num_parameters=100, tokens=7) == 4200


def row(*segments: Segment) -> Batch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(nothing, nothing, segments, nothing, nothing, nothing, 0, ())


def test_attention_pairs_by_hand() -> None:
    """A prompt of 4 (10 pairs), a completion of 2 behind it (3 + 2·4 = 11) and one of 3 (6 + 3·4 = 18), a lone
    sequence of 5 (15): 54."""
    batch = row(Segment(0, 4), Segment(4, 6, 0, 4), Segment(6, 9, 0, 4), Segment(9, 14))
    assert attention_pairs(batch) == 10 + 11 + 18 + 15


def test_attention_pairs_against_an_explicit_mask() -> None:
    """The number of ones in the (T, T) mask the segments describe."""
    segments = (Segment(0, 5), Segment(5, 9, 0, 5), Segment(9, 10, 0, 5), Segment(10, 13), Segment(13, 19, 10, 13))
    mask = torch.zeros(19, 19, dtype=torch.bool)
    for s in segments:
        mask[s.start : s.stop, s.start : s.stop] = torch.ones(s.stop - s.start, s.stop - s.start).tril().bool()
        mask[s.start : s.stop, s.prefix_start : s.prefix_stop] = True
    assert attention_pairs(row(*segments)) == int(mask.sum())


def test_a_shared_prompt_is_cheaper_than_two_copies() -> None:
    """The pair of the design, prompt 138, answers 58 and 44: 240 tokens instead of 378, 63.5% of the block work."""
    shared = row(Segment(0, 138), Segment(138, 196, 0, 138), Segment(196, 240, 0, 138))
    copied = row(Segment(0, 196), Segment(196, 378))
    saved = 138 * 139 // 2  # the prompt's own pairs, once
    assert attention_pairs(copied) - attention_pairs(shared) == saved
