"""Generation against transformers' own `generate`, one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.models.small_models import VOCABULARY, as_loaded, small_gpt2, small_llama
from tunelab.errors import ConfigError
from tunelab.models.generation import GenerationSettings, generate
from tunelab.models.sampling import draw, filter_logits, penalize_repetition, row_generator

PROMPTS = [[5], [17, 400, 3, 9, 9, 250, 31], [700, 12, 45], [1023, 2, 88, 41, 7]]


def small_mistral(window: int = 8) -> MistralForCausalLM:
    """A sliding window of few tokens, shorter than prompt and answer together."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=window,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return MistralForCausalLM(config).eval()


def small_mamba() -> MambaForCausalLM:
    """No key-value cache and no attention mask: a recurrent model."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return MambaForCausalLM(config).eval()


def transformers_greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int, **options: object) -> list[int]:
    """transformers' answer to one prompt alone: no padding takes part."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("build", [small_gpt2, small_llama, small_mistral, small_mamba])
def test_greedy_equals_transformers_token_for_token(build: object, penalty: float) -> None:
    model = build()  # type: ignore[operator]
    answers = generate(as_loaded(model), PROMPTS, GenerationSettings(max_new_tokens=24, repetition_penalty=penalty))
    expected = [transformers_greedy(model, prompt, 24, repetition_penalty=penalty) for prompt in PROMPTS]
    assert [list(answer.ids) for answer in answers] == expected
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS), "the answers must differ for this to say anything"


def end_early(model: PreTrainedModel, answer: list[int]) -> int:
    """Make a token in the middle of `answer` an end of sequence."""
    eos = next(token for token in answer[4:] if token not in answer[:4])
    model.generation_config.eos_token_id = [0, eos]
    return eos


@pytest.mark.parametrize("build", [small_gpt2, small_llama])
def test_rows_end_each_for_itself(build: object) -> None:
    model = build()  # type: ignore[operator]
    eos = end_early(model, transformers_greedy(model, PROMPTS[1], 24))
    answers = generate(as_loaded(model), PROMPTS, GenerationSettings(max_new_tokens=24))
    expected = [transformers_greedy(model, prompt, 24) for prompt in PROMPTS]
    assert [list(answer.ids) for answer in answers] == expected
    assert answers[1].finish_reason == "eos"
    assert answers[1].ids[-1] == eos
    assert {answer.finish_reason for answer in answers} == {"eos", "length"}
    for answer in answers:
        assert (answer.ids[-1] in (0, eos)) == (answer.finish_reason == "eos")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_companions(temperature: float) -> None:
    loaded = as_loaded(small_llama())
    together = generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=16, temperature=temperature))
    in_twos = generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=16, temperature=temperature, batch_size=2))
    alone = generate(loaded, PROMPTS[:1], GenerationSettings(max_new_tokens=16, temperature=temperature))
    assert together == in_twos
    assert together[:1] == alone


def test_the_seed_decides_a_sample_and_nothing_else_is_touched() -> None:
    loaded = as_loaded(small_gpt2())
    sampled = GenerationSettings(max_new_tokens=16, temperature=1.0, top_k=50, top_p=0.9, seed=7)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(loaded, PROMPTS, sampled)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert generate(loaded, PROMPTS, sampled) == first
    other = GenerationSettings(max_new_tokens=16, temperature=1.0, top_k=50, top_p=0.9, seed=8)
    assert generate(loaded, PROMPTS, other) != first
    twice = generate(loaded, [PROMPTS[0], PROMPTS[0]], sampled)
    assert twice[0].ids != twice[1].ids, "two samples for one prompt are independent"


@pytest.mark.parametrize("top_k", [None, 1, 20, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_filters_equal_transformers(top_k: int | None, top_p: float) -> None:
    logits = 3 * torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    logits[1, :50] = logits[1].max()  # ties at the top
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = processors(torch.zeros(8, 1, dtype=torch.long), logits.clone())
    assert torch.equal(filter_logits(logits, 0.7, top_k, top_p), expected)


def test_repetition_penalty_equals_transformers() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 2], [3, 4, 5], [49, 0, 49]])
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    assert torch.equal(penalize_repetition(logits, seen, 1.7), expected)


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square of 20,000 draws over 5 tokens: 4 degrees of freedom, 0.999 quantile 18.5.

    The token of probability 0 (logit −inf) stands first, in the middle and last, and is never drawn.
    """
    probabilities = torch.tensor([0.0, 0.1, 0.4, 0.0, 0.05, 0.2, 0.25, 0.0])
    num_draws = 20_000
    generator = torch.Generator().manual_seed(0)
    rows = probabilities.log().expand(num_draws, -1)
    counts = torch.bincount(draw(rows, [generator] * num_draws), minlength=8).double()
    assert counts[probabilities == 0].sum() == 0
    expected = num_draws * probabilities.double()
    positive = expected > 0
    assert ((counts - expected)[positive] ** 2 / expected[positive]).sum() < 18.5


def test_row_generators_differ_by_seed_and_by_row() -> None:
    numbers = {float(torch.rand((), generator=row_generator(seed, i))) for seed in range(10) for i in range(10)}
    assert len(numbers) == 100


class Scripted:
    """A stand-in for a model's choices: GPT-2 whose logits are replaced so that it says a given text."""

    def __init__(self, says: list[int]) -> None:
        self.loaded = as_loaded(small_gpt2())
        model, says = self.loaded.model, list(says)

        def say(module: object, args: object, output: object) -> object:
            logits = torch.full_like(output.logits, -10.0)  # type: ignore[attr-defined]
            logits[:, -1, says.pop(0)] = 10.0
            output.logits = logits  # type: ignore[attr-defined]
            return output

        model.register_forward_hook(say)


def speak(text: str, stop: tuple[str, ...] = (), eos: bool = True) -> tuple[object, list[str], int]:
    """(Generation, streamed pieces, number of tokens of `text`) when the model says `text`."""
    ids = as_loaded(small_gpt2()).tokenizer(text).input_ids
    pieces: list[str] = []
    settings = GenerationSettings(max_new_tokens=len(ids) + 1, stop=stop)
    answer = generate(Scripted([*ids, 0 if eos else 5]).loaded, [[9]], settings, lambda _, piece: pieces.append(piece))
    return answer[0], pieces, len(ids)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Hello there.\n\nHuman: more", ("\n\nHuman:",), "Hello there."),
        ("a\n\nHum of bees", ("\n\nHuman:",), "a\n\nHum of bees"),  # began like a stop string
        ("one two three", ("three", "two"), "one "),  # the first in the text, not in the list
        ("aaab", ("aab",), "a"),  # overlaps its own beginning
        ("stop", ("stop",), ""),
    ],
)
def test_stop_strings_cut_the_text_and_are_never_streamed(text: str, stop: tuple[str, ...], expected: str) -> None:
    answer, pieces, num_tokens = speak(text, stop)
    assert answer.text == expected  # type: ignore[attr-defined]
    assert "".join(pieces) == expected
    stopped = expected != text
    assert answer.finish_reason == ("stop" if stopped else "eos")  # type: ignore[attr-defined]
    assert (len(answer.ids) <= num_tokens) == stopped  # type: ignore[attr-defined]


def test_pieces_are_whole_characters_as_they_come() -> None:
    """The tokenizer knows none of these characters: each is three or four tokens of one byte."""
    text = "é 漢字 🤗!"
    answer, pieces, num_tokens = speak(text)
    assert num_tokens > len(text)
    assert "".join(pieces) == answer.text == text  # type: ignore[attr-defined]
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) >= 5, "streamed, not sent at the end"


def test_bytes_that_are_no_character_are_sent_at_the_end() -> None:
    first_byte_of_a_character = as_loaded(small_gpt2()).tokenizer("漢").input_ids[0]
    pieces: list[str] = []
    loaded = Scripted([first_byte_of_a_character, 0]).loaded
    [answer] = generate(loaded, [[9]], GenerationSettings(), lambda _, piece: pieces.append(piece))
    assert pieces == ["\ufffd"] == [answer.text]


def test_streamed_pieces_name_their_prompt_and_join_to_its_text() -> None:
    loaded = as_loaded(small_llama())
    pieces = dict.fromkeys(range(len(PROMPTS)), "")

    def collect(index: int, piece: str) -> None:
        pieces[index] += piece

    answers = generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=20, batch_size=3), collect)
    assert [answer.text for answer in answers] == list(pieces.values())


def test_mode_and_attention_are_as_before() -> None:
    model = small_gpt2(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    expected = transformers_greedy(model, PROMPTS[1], 8)
    model.train()
    model.transformer.h[0].eval()  # a frozen part
    model.set_attn_implementation("eager")
    modes = [module.training for module in model.modules()]
    answer = generate(as_loaded(model), PROMPTS[1:2], GenerationSettings(max_new_tokens=8))
    assert list(answer[0].ids) == expected, "dropout took part"
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, r"prompt 1 is empty"),
        ([[1] * 100], {"max_new_tokens": 29}, r"prompt 0 has 100 tokens.*max_new_tokens 29.*context of 128"),
        ([[1]], {"max_new_tokens": 0}, r"max_new_tokens is 0 and must be at least 1"),
        ([[1]], {"batch_size": 0}, r"batch_size"),
        ([[1]], {"temperature": -1.0}, r"temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, r"temperature is nan"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, r"top_k is 0"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, r"top_p is 0.0"),
        ([[1]], {"temperature": 1.0, "top_p": 1.5}, r"top_p is 1.5"),
        ([[1]], {"repetition_penalty": 0.0}, r"repetition_penalty is 0.0"),
        ([[1]], {"stop": ("",)}, r"stop is \('',\)"),
        ([[1]], {"seed": -1}, r"seed is -1"),
        ([[1]], {"top_k": 5}, r"read only while sampling; set temperature"),
    ],
)
def test_refused(prompts: list[list[int]], settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(as_loaded(small_gpt2()), prompts, GenerationSettings(**settings))


def test_the_longest_prompt_that_fits_is_answered() -> None:
    [answer] = generate(as_loaded(small_gpt2()), [[1] * 100], GenerationSettings(max_new_tokens=28))
    assert len(answer.ids) == 28 or answer.finish_reason == "eos"
