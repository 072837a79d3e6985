"""Pieces of text → token ids that meet exactly at the pieces' borders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tunelab.errors import ConfigError


class Tokenizer(Protocol):
    """What this room asks of a transformers PreTrainedTokenizerFast. (Attributes as there.)"""

    chat_template: Any
    eos_token_id: int | None
    bos_token_id: int | None
    all_special_tokens: list[str]
    added_tokens_decoder: Mapping[int, Any]

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


Encode = Callable[[str], list[int]]


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, list[int]]:
    """Ids of each distinct text, without special tokens of the tokenizer's own making. One call, so in parallel."""
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    # verbose=False: the warning about texts beyond the model's context does not know that max_length comes later.
    ids = tokenizer(unique, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return dict(zip(unique, ids, strict=True))


def encode_pieces(pieces: Sequence[str], encode: Encode) -> list[list[int]]:
    """Ids of each piece, such that every border between pieces is a border between tokens.

    They are the ids of the whole text wherever that has a token border at the pieces' border. Where a token of the
    whole text would straddle it, the text is cut there and the two sides are tokenised apart. Either way the ids up to
    a border are those of the text up to that border, tokenised alone: what a model is given when it generates.
    """
    found: list[list[int]] = []
    run_text, run_ids = "", []  # type: str, list[int]
    for piece in pieces:
        run_text += piece
        ids = encode(run_text)
        if ids[: len(run_ids)] == run_ids:
            found.append(ids[len(run_ids) :])
            run_ids = ids
        else:
            run_text, run_ids = piece, encode(piece)
            found.append(run_ids)
    return found


def prefixes(pieces: Sequence[str]) -> list[str]:
    """The texts `encode_pieces` asks for if no token straddles a border."""
    return ["".join(pieces[: stop + 1]) for stop in range(len(pieces))]


def end_of_sequence(tokenizer: Tokenizer) -> int:
    """The tokenizer's EOS id. Raises ConfigError if it has none."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("model.tokenizer: has no end-of-sequence token, so no answer could ever end; set eos_token")
    return tokenizer.eos_token_id


def beginning_of_sequence(tokenizer: Tokenizer) -> list[int]:
    """[BOS] if the tokenizer puts one before text by itself (Llama), else [] (GPT-2, SmolLM2).

    Plain text and transcripts begin with it, because the model never saw text without. Chat templates write their own.
    """
    probe = tokenizer("a", verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    begins = len(probe) > len(plain) and probe[0] == tokenizer.bos_token_id
    return [probe[0]] if begins else []
