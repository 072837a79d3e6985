"""Where the loss lies, token by token, against texts written out by hand."""

# ruff: noqa: E501  (one row a case)
from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.data.small_tokenizers import CHATML, FORGETFUL, LLAMA2, PLAIN, byte_level, metaspace
from tunelab.data import Dataset, RecordSet, prepare, render_sample
from tunelab.data.encoding import encode_pieces
from tunelab.errors import EXIT_DATA, EXIT_USAGE, ConfigError, DataError
from tunelab.types import Conversation, Message, Origin, PlainText, PreferencePair, PromptCompletion, Record

HERE = Origin("a.jsonl", 1)
SYSTEM = Message("system", "Be brief.")
USER, ANSWER = Message("user", "How are you?"), Message("assistant", "Well, thanks.")
USER2, ANSWER2 = Message("user", "And the egg?"), Message("assistant", "Cooled.")
DIALOGUE = Conversation((USER, ANSWER, USER2, ANSWER2), HERE)
TRANSCRIPT = PreferencePair(
    "\n\nHuman: How are you?\n\nAssistant: Well, thanks.\n\nHuman: And the egg?\n\nAssistant:",
    " Cooled.",
    " Eaten.",
    HERE,
)


def record_set(*records: Record, on_error: str = "raise") -> RecordSet:
    return RecordSet(records, "a shape", (), (), "", "a.jsonl", "train", on_error)  # type: ignore[arg-type]


def run(record: Record, tokenizer: PreTrainedTokenizerFast, method: str = "sft", **options: object) -> Dataset:
    return prepare(record_set(record), tokenizer, method=method, max_length=10_000, **options)  # type: ignore[arg-type]


def marked(dataset: Dataset, tokenizer: PreTrainedTokenizerFast, completion: int = 0) -> str:
    """The first example's text, with what carries loss in ⟦ ⟧."""
    example = dataset.examples[0]
    text, inside = "", False
    for piece, loss in render_sample(example, tokenizer, completion):
        if loss != inside:
            text += "⟦" if loss else "⟧"
            inside = loss
        text += piece
    return text + ("⟧" if inside else "")


CASES = {
    # name: (record, template, options, expected)
    "chatml, every answer": (
        DIALOGUE, CHATML, {},
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n⟦Well, thanks.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd the egg?<|im_end|>\n<|im_start|>assistant\n⟦Cooled.<|im_end|>⟧",
    ),
    "chatml, the last answer": (
        DIALOGUE, CHATML, {"loss_on": "last_completion"},
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nWell, thanks.<|im_end|>\n"
        "<|im_start|>user\nAnd the egg?<|im_end|>\n<|im_start|>assistant\n⟦Cooled.<|im_end|>⟧",
    ),
    "chatml, everything": (
        Conversation((USER, ANSWER), HERE), CHATML, {"loss_on": "all"},
        "<|im_start|>⟦user\nHow are you?<|im_end|>\n<|im_start|>assistant\nWell, thanks.<|im_end|>⟧",
    ),
    "chatml with a system message": (
        PromptCompletion((SYSTEM, USER), (ANSWER,), None, HERE), CHATML, {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Well, thanks.<|im_end|>⟧",
    ),
    "chatml, earlier answers are prompt": (
        PromptCompletion((USER, ANSWER, USER2), (ANSWER2,), None, HERE), CHATML, {},
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nWell, thanks.<|im_end|>\n"
        "<|im_start|>user\nAnd the egg?<|im_end|>\n<|im_start|>assistant\n⟦Cooled.<|im_end|>⟧",
    ),
    "chatml, a completion of three turns": (
        PromptCompletion((USER,), (ANSWER, USER2, ANSWER2), None, HERE), CHATML, {},
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n⟦Well, thanks.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd the egg?<|im_end|>\n<|im_start|>assistant\n⟦Cooled.<|im_end|>⟧",
    ),
    "chatml, a plain prompt": (
        PromptCompletion("How are you?", "Well, thanks.", None, HERE), CHATML, {"render": "chat"},
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n⟦Well, thanks.<|im_end|>⟧",
    ),
    "chatml, a transcript parsed": (
        TRANSCRIPT, CHATML, {"render": "chat"},
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nWell, thanks.<|im_end|>\n"
        "<|im_start|>user\nAnd the egg?<|im_end|>\n<|im_start|>assistant\n⟦Cooled.<|im_end|>⟧",
    ),
    "llama 2, every answer": (
        DIALOGUE, LLAMA2, {},
        "<s>[INST] How are you? [/INST]⟦ Well, thanks. </s>⟧<s>[INST] And the egg? [/INST]⟦ Cooled. </s>⟧",
    ),
    "llama 2 with a system message": (
        Conversation((SYSTEM, USER, ANSWER), HERE), LLAMA2, {},
        "<s>[INST] <<SYS>>Be brief.<</SYS>>How are you? [/INST]⟦ Well, thanks. </s>⟧",
    ),
    "a template without special tokens gets EOS at the end": (
        DIALOGUE, PLAIN, {},
        "user: How are you?\nassistant: ⟦Well, thanks.\n⟧user: And the egg?\nassistant: ⟦Cooled.\n<|endoftext|>⟧",
    ),
    "a forgetful template can do the last answer": (
        DIALOGUE, FORGETFUL, {"loss_on": "last_completion"},
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n...<|im_end|>\n"
        "<|im_start|>user\nAnd the egg?<|im_end|>\n<|im_start|>assistant\n⟦Cooled.<|im_end|>⟧",
    ),
    "turns without a template": (
        DIALOGUE, None, {},
        "\n\nHuman: How are you?\n\nAssistant:⟦ Well, thanks.⟧\n\nHuman: And the egg?\n\nAssistant:⟦ Cooled.<|endoftext|>⟧",
    ),
    "transcript though there is a template": (
        Conversation((SYSTEM, USER, ANSWER), HERE), CHATML, {"render": "transcript"},
        "Be brief.\n\nHuman: How are you?\n\nAssistant:⟦ Well, thanks.<|endoftext|>⟧",
    ),
    "a plain prompt as transcript": (
        PromptCompletion("How are you?", "Well, thanks.", None, HERE), None, {"render": "transcript"},
        "\n\nHuman: How are you?\n\nAssistant:⟦ Well, thanks.<|endoftext|>⟧",
    ),
    "hh-rlhf as it stands": (
        TRANSCRIPT, CHATML, {},
        "\n\nHuman: How are you?\n\nAssistant: Well, thanks.\n\nHuman: And the egg?\n\nAssistant:⟦ Cooled.<|endoftext|>⟧",
    ),
    "hh-rlhf as a transcript is the same": (
        TRANSCRIPT, CHATML, {"render": "transcript"},
        "\n\nHuman: How are you?\n\nAssistant: Well, thanks.\n\nHuman: And the egg?\n\nAssistant:⟦ Cooled.<|endoftext|>⟧",
    ),
    "prompt and completion as they stand": (
        PromptCompletion("2+2=", "4", None, HERE), CHATML, {}, "2+2=⟦4<|endoftext|>⟧",
    ),
    "an EOS written in the data is not doubled": (
        PromptCompletion("2+2=", "4<|endoftext|>", None, HERE), None, {}, "2+2=⟦4<|endoftext|>⟧",
    ),
    "running text": (PlainText("On and on.", HERE), CHATML, {}, "O⟦n and on.<|endoftext|>⟧"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_loss_lies_exactly_where_it_should(name: str) -> None:
    record, template, options, expected = CASES[name]
    tokenizer = byte_level(template)
    dataset = run(record, tokenizer, **options)
    assert marked(dataset, tokenizer) == expected
    example = dataset.examples[0]
    (completion,) = example.completions
    if len(example.prompt_ids):
        assert completion.loss_mask[0], "the prompt runs to the first loss"
    else:
        assert not completion.loss_mask[0]
        assert completion.loss_mask[1:].all()
    assert completion.loss_mask[-1], "nothing follows the last loss"


def test_a_pair_shares_its_prompt() -> None:
    tokenizer = byte_level(CHATML)
    pair = PreferencePair((USER,), (ANSWER,), (ANSWER2,), HERE)
    dataset = run(pair, tokenizer, "dpo")
    head = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    assert marked(dataset, tokenizer, 0) == head + "⟦Well, thanks.<|im_end|>⟧"
    assert marked(dataset, tokenizer, 1) == head + "⟦Cooled.<|im_end|>⟧"
    assert dataset.examples[0].prompt_ids.tolist() == tokenizer(head)["input_ids"]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, None])
def test_ids_are_those_of_the_whole_text(template: str | None) -> None:
    """The pieces' ids, joined, are the tokenizer's ids of the whole text at once: no border changed anything."""
    tokenizer = byte_level(template)
    (example,) = run(DIALOGUE, tokenizer).examples
    ids = [*example.prompt_ids.tolist(), *example.completions[0].ids.tolist()]
    assert ids == tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<s>")) == (2 if template == LLAMA2 else 0), "one BOS a question"


def test_roles_must_alternate_only_where_the_template_says_so() -> None:
    twice = Conversation((USER, USER2, ANSWER), Origin("a.jsonl", 7))
    assert len(run(twice, byte_level(CHATML))) == 1
    with pytest.raises(
        DataError, match=r"^a\.jsonl:7: the chat template refuses these turns: .*must alternate"
    ) as caught:
        run(twice, byte_level(LLAMA2))
    assert caught.value.exit_code == EXIT_DATA
    records = record_set(twice, DIALOGUE, on_error="skip")
    summary = prepare(records, byte_level(LLAMA2), method="sft").summary
    assert summary.used == 1
    assert summary.skipped.origins == ("a.jsonl:7",)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: message \[1\]: the chat template does not keep earlier turns"):
        run(DIALOGUE, byte_level(FORGETFUL))


@pytest.mark.parametrize(
    ("record", "template", "render", "message"),
    [
        (DIALOGUE, None, "chat", "the tokenizer has no chat template"),
        (DIALOGUE, CHATML, "text", "the records are messages"),
    ],
)
def test_modes_that_cannot_be_had(record: Record, template: str | None, render: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.render: .*{message}") as caught:
        run(record, byte_level(template), render=render)
    assert caught.value.exit_code == EXIT_USAGE


def test_a_late_system_message_has_no_place_in_a_transcript() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: a transcript takes a system message at its beginning only"):
        run(Conversation((USER, SYSTEM, ANSWER), HERE), byte_level())


def test_bos_where_the_tokenizer_puts_one() -> None:
    """Llama-like tokenizers put <s> before text; the model never saw text without. Once, and none in a chat."""
    tokenizer = metaspace()
    record = PromptCompletion("The capital", " of France", None, HERE)
    (example,) = run(record, tokenizer).examples
    ids = [*example.prompt_ids.tolist(), *example.completions[0].ids.tolist()]
    assert ids == [*tokenizer("The capital of France")["input_ids"], tokenizer.eos_token_id]
    assert ids[0] == tokenizer.bos_token_id
    written = PromptCompletion("<s>The capital", " of France", None, HERE)
    assert run(written, tokenizer).examples[0].prompt_ids.tolist().count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = LLAMA2
    (chat,) = run(Conversation((USER, ANSWER), HERE), tokenizer).examples
    assert chat.prompt_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"model\.tokenizer: has no end-of-sequence token"):
        run(DIALOGUE, tokenizer)


# --- borders between pieces ---------------------------------------------------------------------------------------


def encode_with(tokenizer: PreTrainedTokenizerFast):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_token_across_a_border_is_split() -> None:
    """`the` is one token of the corpus' BPE; cut as `th` + `e`, each side is tokenised alone."""
    tokenizer = byte_level()
    encode = encode_with(tokenizer)
    assert len(encode(" the")) == 1
    assert encode_pieces([" th", "e", " egg"], encode) == [encode(" th"), encode("e"), encode(" egg")]


def test_metaspace_words_behind_a_border_get_no_second_space() -> None:
    """Tokenised apart, ` of` would become `▁▁of` under a tokenizer that puts ▁ before every text."""
    encode = encode_with(metaspace())
    first, second = encode_pieces(["The capital", " of France"], encode)
    assert first + second == encode("The capital of France")
    assert second != encode(" of France")


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.text(alphabet="aeghnt '.\n?é😀", max_size=8), min_size=1, max_size=5))
def test_pieces_meet_at_borders_and_lose_nothing(pieces: list[str]) -> None:
    tokenizer = byte_level()
    encode = encode_with(tokenizer)
    found = encode_pieces(pieces, encode)
    assert [tokenizer.decode(ids) for ids in found] == pieces
    assert found[0] == encode(pieces[0])
    prefixes = [encode("".join(pieces[: stop + 1])) for stop in range(len(pieces))]
    if all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(prefixes)):
        assert [token for ids in found for token in ids] == prefixes[-1], "no token straddles a border"
