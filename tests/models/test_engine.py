"""The packed engine against plain, padded transformers in float32: loss and every gradient.

The oracle below is written here from scratch: each sequence alone through `model(input_ids).logits`, without padding,
log-softmax, gather, sum. It shares no code with `tunelab`.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tunelab.models.attention import PACKED_ATTENTION, plain_attention
from tunelab.models.checkpointing import enable_checkpointing
from tunelab.models.packed import enable_packing, packed_logprobs
from tunelab.models.padded import padded_logprobs
from tunelab.types import Batch, Segment

VOCAB = 97


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    llama = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "attn_implementation": "sdpa",
    }
    grouped = llama | {"num_key_value_heads": 2}
    gpt2 = {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "attn_implementation": "sdpa",
    }
    models = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
        "gpt2-by-layer": lambda: GPT2LMHeadModel(GPT2Config(**gpt2, scale_attn_by_inverse_layer_idx=True)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**grouped)),
        "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**grouped, tie_word_embeddings=True)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**grouped)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**llama)),
    }
    model = models[kind]()
    # Initial weights are near zero, which would hide mistakes in attention: make every part matter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
    return model.eval()


def draw(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


ROWS: dict[str, list[tuple[int, list[int]]]] = {
    "one sequence": [(5, [7])],
    "several sequences": [(5, [7]), (3, [9]), (8, [2])],
    "prompts of one": [(1, [6]), (1, [3])],
    "completions of one": [(4, [1]), (6, [1])],
    "everything of one": [(1, [1])],
    "one pair": [(6, [4, 7])],
    "several pairs": [(6, [4, 7]), (3, [5, 2]), (9, [8, 8])],
    "pairs with prompts of one": [(1, [4, 3]), (1, [1, 1])],
    "pairs with completions of one": [(5, [1, 6]), (2, [4, 1])],
    "a group of four samples": [(5, [3, 1, 6, 2])],
    "pairs beside sequences": [(4, [3]), (5, [2, 6]), (1, [5])],
}


def make_row(shape: list[tuple[int, list[int]]]) -> tuple[Batch, list[tuple[list[int], list[int]]]]:
    """A packed row and, for the oracle, each sequence's (prompt ids, completion ids)."""
    generator = torch.Generator().manual_seed(1)
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    sequences: list[tuple[list[int], list[int]]] = []
    for prompt_length, lengths in shape:
        prompt = draw(prompt_length, generator)
        start = len(ids)
        stop = start + prompt_length
        ids += prompt
        positions += range(prompt_length)
        if len(lengths) > 1:
            segments.append(Segment(start, stop))
        for length in lengths:
            completion = draw(length, generator)
            first = len(ids)
            ids += completion
            positions += range(prompt_length, prompt_length + length)
            if len(lengths) > 1:
                segments.append(Segment(first, first + length, start, stop))
            else:
                segments.append(Segment(start, first + length))
            predictors += [stop - 1, *range(first, first + length - 1)]
            targets += completion
            owners += [len(sequences)] * length
            sequences.append((prompt, completion))
    batch = Batch(
        torch.tensor(ids), torch.tensor(positions), tuple(segments), torch.tensor(predictors), torch.tensor(targets),
        torch.tensor(owners), len(sequences), tuple(range(len(shape))),
    )  # fmt: skip
    return batch, sequences


def oracle_logprobs(model: PreTrainedModel, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    found = []
    for prompt, completion in sequences:
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1)
        found.append(logprobs[range(len(prompt) - 1, len(prompt) + len(completion) - 1), completion])
    return torch.cat(found)


def gradients(model: PreTrainedModel, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of an uneven weighted sum, so that errors that cancel in a plain sum show."""
    weights = torch.linspace(-1.0, 2.0, len(logprobs)).cos()
    model.zero_grad()
    (logprobs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        # Relative to the tensor's own size; a tensor of nothing but rounding is held to the model's scale.
        scale = expected[name].abs().max().clamp(min=1e-2 * largest)
        assert (found[name] - expected[name]).abs().max() <= 2e-5 * scale, name


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", ["gpt2", "gpt2-by-layer", "llama", "llama-tied", "qwen2", "neox"])
def test_packed_row_equals_each_sequence_alone(kind: str, row: str) -> None:
    model = build(kind)
    batch, sequences = make_row(ROWS[row])
    expected = oracle_logprobs(model, sequences)
    expected_gradients = gradients(model, expected)

    assert enable_packing(model) is None
    assert model.config._attn_implementation == PACKED_ATTENTION
    found = packed_logprobs(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert_same(gradients(model, found), expected_gradients)


@pytest.mark.parametrize("row", ["several sequences", "several pairs", "pairs beside sequences"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padded_layout_equals_each_sequence_alone(kind: str, row: str) -> None:
    model = build(kind)
    batch, sequences = make_row(ROWS[row])
    expected = oracle_logprobs(model, sequences)
    expected_gradients = gradients(model, expected)
    found = padded_logprobs(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert_same(gradients(model, found), expected_gradients)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    """Recomputation happens in backward, outside the forward call: the segments must travel with it."""
    model = build(kind)
    assert enable_packing(model) is None
    model.train()
    batch, _ = make_row(ROWS["several pairs"])
    expected = gradients(model, packed_logprobs(model, batch))
    enable_checkpointing(model)
    forwards: list[int] = []
    blocks = model.transformer.h if kind == "gpt2" else model.model.layers
    next(blocks[0].children()).register_forward_pre_hook(lambda *_: forwards.append(1))
    found = gradients(model, packed_logprobs(model, batch))
    assert len(forwards) == 2, "the block must be computed once more in backward"
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)


def test_a_row_of_one_segment_is_the_plain_model() -> None:
    model = build("llama")
    ids = torch.tensor([draw(11, torch.Generator().manual_seed(3))])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert enable_packing(model) is None
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)


def test_plain_attention_is_restored() -> None:
    model = build("gpt2")
    assert enable_packing(model) is None
    with plain_attention(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == PACKED_ATTENTION


class _ScaledHead(LlamaForCausalLM):
    """Logits that are not hidden·W, as in Cohere's or Granite's models."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def test_a_model_with_a_scaled_head_is_refused_with_the_reason() -> None:
    model = _ScaledHead(build("llama").config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    reason = enable_packing(model)
    assert reason is not None
    assert "differ from the plain model's" in reason
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_ignores_the_interface_is_refused() -> None:
    """A sliding window shorter than the row is not what packed attention computes."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, attn_implementation="sdpa",
    )  # fmt: skip
    reason = enable_packing(MistralForCausalLM(config).eval())
    assert reason is not None
    assert "sliding_window" in reason


def test_a_window_wider_than_every_sequence_packs_whatever_the_row() -> None:
    """The window is per sequence: a row of many short ones may be far longer (Mistral, Phi-3)."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=20, attn_implementation="sdpa",
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    batch, sequences = make_row([(5, [7]), (3, [9]), (8, [2]), (9, [8, 8])])
    expected = oracle_logprobs(model, sequences)
    assert batch.num_tokens > 20
    assert enable_packing(model, longest=17) is None
    torch.testing.assert_close(packed_logprobs(model, batch), expected, rtol=1e-5, atol=2e-5)
    reason = enable_packing(MistralForCausalLM(config).eval(), longest=21)
    assert reason == "its attention slides over 20 tokens, and sequences may have 21"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_ignore_segments_are_found_out_in_any_precision(dtype: torch.dtype) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)).to(dtype).eval()
    assert enable_packing(model) is not None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bf16_weights_pack(kind: str) -> None:
    assert enable_packing(build(kind).to(torch.bfloat16)) is None
