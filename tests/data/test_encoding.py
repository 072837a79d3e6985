"""Shortcuts to token ids: the ids must be those that transformers gives for the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.small_tokenizers import CHATML, CORPUS, byte_level, metaspace
from tunelab.data import encoding
from tunelab.data.encoding import Encode, encoder, tokenizer_identity


def awkward() -> PreTrainedTokenizerFast:
    """Added tokens that swallow white space or want to be words, and one that another begins with."""
    tokenizer = byte_level()
    tokenizer.add_tokens(
        [
            AddedToken("<eat>", special=True, normalized=False, lstrip=True, rstrip=True),
            AddedToken("word", special=True, normalized=False, single_word=True),
            AddedToken("<|im_end|>!", special=False, normalized=False),
        ]
    )
    return tokenizer


def first_only() -> PreTrainedTokenizerFast:
    """Like newer Llama-likes: ▁ is put before the text's beginning only, not behind special tokens."""
    inner: Tokenizer = metaspace().backend_tokenizer
    rebuilt = Tokenizer.from_str(inner.to_str())
    rebuilt.normalizer = None  # type: ignore[assignment]
    rebuilt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=rebuilt, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte-level": byte_level(CHATML), "metaspace": metaspace(), "first": first_only(), "awkward": awkward()}
WORDS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<eat>",
    "word",
    "!",
    " ",
    "\n",
    "The",
    "egg",
    "é",
]


def by_transformers(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map("".join), max_size=4))
def test_the_ids_are_those_of_the_whole_text(name: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    encode = encoder(tokenizer, texts)
    for text in [*texts, "asked for later <|im_end|> The egg"]:
        assert encode(text) == by_transformers(tokenizer, text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ordinary_text(name: str) -> None:
    encode = encoder(TOKENIZERS[name], CORPUS)
    for text in CORPUS:
        assert encode(text) == by_transformers(TOKENIZERS[name], text)


def test_a_chat_is_tokenised_once_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for every stage of a dialogue, the tokenizer sees each turn once, not once a stage."""
    tokenizer, seen = byte_level(CHATML), 0
    real = encoding.encode_batch

    def counting(tokenizer: Any, texts: list[str]) -> dict[str, list[int]]:
        nonlocal seen
        seen += sum(map(len, set(texts)))
        return real(tokenizer, texts)

    monkeypatch.setattr(encoding, "encode_batch", counting)
    turns = [f"<|im_start|>user\nQuestion number {n}?<|im_end|>\n" for n in range(50)]
    stages = ["".join(turns[:stop]) for stop in range(1, 51)]
    encode: Encode = encoder(tokenizer, stages)
    assert [encode(stage) for stage in stages] == [by_transformers(tokenizer, stage) for stage in stages]
    assert seen < 2 * len(stages[-1])


class Slow:
    """A tokenizer of Python: no Rust side to go to."""

    is_fast = False

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self._inner = inner

    def __call__(self, text: Any, **options: Any) -> Any:
        return self._inner(text, **options)

    def __getattr__(self, name: str) -> Any:
        if name in ("backend_tokenizer", "_tokenizer", "split_special_tokens"):
            raise AttributeError(name)
        return getattr(self._inner, name)


def test_tokenizers_without_a_rust_side(tmp_path: Path) -> None:
    slow, other = Slow(byte_level(CHATML)), Slow(byte_level())
    text = "<|im_start|>user\nThe egg<|im_end|>"
    assert encoder(slow, [text])(text) == by_transformers(byte_level(CHATML), text)
    assert tokenizer_identity(slow) == tokenizer_identity(Slow(byte_level(CHATML)))
    assert tokenizer_identity(slow) != tokenizer_identity(other)


def test_a_class_with_text_handling_of_its_own_is_asked() -> None:
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *arguments: Any, **options: Any) -> Any:
            return super()._encode_plus([part.upper() for part in text], *arguments, **options)

    tokenizer = Shouting(tokenizer_object=byte_level().backend_tokenizer, eos_token="<|endoftext|>")
    text = "The egg<|endoftext|>The egg"
    assert encoder(tokenizer, [text])(text) == by_transformers(byte_level(), "THE EGG<|ENDOFTEXT|>THE EGG")
