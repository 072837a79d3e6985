"""The packed engine against plain, padded transformers in float32: loss and every gradient.

The oracle below is written here from scratch: each sequence alone through `model(input_ids).logits`, without padding,
log-softmax, gather, sum. It shares no code with `tunelab`.
"""

from __future__ import annotations

from dataclasses import replace

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
from tunelab.models.fused import forward
from tunelab.models.packed import enable_fused_blocks, enable_packing, packed_logprobs
from tunelab.models.padded import padded_logprobs
from tunelab.models.shortcuts import Shortcuts
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
        "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**llama, attention_bias=True, mlp_bias=True)),
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
@pytest.mark.parametrize("kind", ["gpt2", "gpt2-by-layer", "llama", "llama-tied", "llama-biased", "qwen2"])
@pytest.mark.parametrize("shortcuts", [Shortcuts(), Shortcuts(prune_last_block=False)], ids=["all", "unpruned"])
def test_fused_blocks_equal_each_sequence_alone(shortcuts: Shortcuts, kind: str, row: str) -> None:
    model = build(kind)
    batch, sequences = make_row(ROWS[row])
    expected = oracle_logprobs(model, sequences)
    expected_gradients = gradients(model, expected)

    assert enable_packing(model) is None
    assert enable_fused_blocks(model) is None
    found = packed_logprobs(model, batch, shortcuts=shortcuts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert_same(gradients(model, found), expected_gradients)


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "llama"])
def test_gradients_made_in_the_forward_pass_are_those_of_the_sum(kind: str) -> None:
    model = build(kind)
    batch, sequences = make_row(ROWS["several sequences"])
    (oracle_logprobs(model, sequences).sum() * -0.3).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert enable_packing(model) is None
    model.zero_grad()
    (packed_logprobs(model, batch, summed=True, shortcuts=Shortcuts()).sum() * -0.3).backward()
    assert_same({name: p.grad.clone() for name, p in model.named_parameters()}, expected)


def test_loss_in_the_middle_of_a_sequence() -> None:
    """A dialogue with loss on two answers, none on the last turn: the last block starts at the first predictor and
    stops at the last, and computes what lies between.
    """
    for kind in ("gpt2", "llama"):
        model = build(kind)
        batch, sequences = make_row([(4, [9]), (5, [7])])
        kept = torch.tensor([1, 2, 5, 9, 10])
        batch = replace(
            batch,
            loss_positions=batch.loss_positions[kept],
            targets=batch.targets[kept],
            sequence_ids=batch.sequence_ids[kept],
        )
        expected = oracle_logprobs(model, sequences)[kept]
        expected_gradients = gradients(model, expected)
        assert enable_packing(model) is None
        assert batch.tail.ranges == ((4, 9), (17, 19))
        found = packed_logprobs(model, batch, shortcuts=Shortcuts())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        assert_same(gradients(model, found), expected_gradients)


def test_a_sequence_without_loss_is_left_out_of_the_last_block() -> None:
    model = build("gpt2")
    batch, sequences = make_row([(4, [3]), (5, [7])])
    kept = torch.arange(3)
    batch = replace(
        batch,
        loss_positions=batch.loss_positions[kept],
        targets=batch.targets[kept],
        sequence_ids=batch.sequence_ids[kept],
    )
    assert enable_packing(model) is None
    assert batch.tail.ranges == ((3, 6), (0, 0))
    found = packed_logprobs(model, batch, shortcuts=Shortcuts())
    torch.testing.assert_close(found, oracle_logprobs(model, sequences)[:3], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attn_pdrop": 0.1}, "it has dropout"),
        ({"activation_function": "relu"}, "its activation is ReLU"),
        ({"reorder_and_upcast_attn": True}, "its attention is upcast (reorder_and_upcast_attn)"),
    ],
)
def test_blocks_made_of_something_else_are_refused_with_the_reason(change: dict, reason: str) -> None:
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, attn_implementation="sdpa", embd_pdrop=0.0)
    for name, value in ({"resid_pdrop": 0.0, "attn_pdrop": 0.0} | change).items():
        setattr(config, name, value)
    model = GPT2LMHeadModel(config).eval()
    assert enable_packing(model) is None
    assert enable_fused_blocks(model) == reason


def test_blocks_put_together_in_another_way_are_found_out() -> None:
    """The parts are Llama's, and one of them is used otherwise: only the numbers can tell."""
    model = build("llama")
    assert enable_packing(model) is None
    assert enable_fused_blocks(model) is None
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 0.5)
    reason = enable_fused_blocks(model)
    assert reason is not None
    assert "differ from the plain model's" in reason


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


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradient_checkpointing_of_fused_blocks_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind).train()
    assert enable_packing(model) is None
    batch, _ = make_row(ROWS["several pairs"])
    expected = gradients(model, packed_logprobs(model, batch, shortcuts=Shortcuts()))
    enable_checkpointing(model)
    forwards: list[int] = []
    plain = forward.block_input
    monkeypatch.setattr(forward, "block_input", lambda *arguments: forwards.append(1) or plain(*arguments))
    found = gradients(model, packed_logprobs(model, batch, shortcuts=Shortcuts()))
    assert len(forwards) == 4, "each of the two blocks must be computed once more in backward"
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
