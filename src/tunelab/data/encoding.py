"""Pieces of text → token ids that meet exactly at the pieces' borders."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunelab.errors import ConfigError


class Tokenizer(Protocol):
    """What this room asks of a transformers tokenizer. (Attributes as there.)

    If `is_fast`, it also has a `backend_tokenizer`, of the `tokenizers` library, and `split_special_tokens`.
    """

    is_fast: bool
    chat_template: Any
    eos_token_id: int | None
    bos_token_id: int | None
    all_special_tokens: list[str]
    added_tokens_decoder: Mapping[int, Any]

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str: ...

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


Encode = Callable[[str], list[int]]


def plain_backend(tokenizer: Any) -> Any:
    """The Rust side of a fast tokenizer, set as transformers sets it for text that is neither cut nor padded."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _is_plain(tokenizer: Tokenizer) -> bool:
    """Whether ids are what the Rust side makes of the text as it stands.

    The few classes that do something to text of their own override a method, a private one: where it is no longer
    found, everything goes the longer way round.
    """
    method = getattr(type(tokenizer), "_encode_plus", None)
    return tokenizer.is_fast and getattr(method, "__module__", "").startswith("transformers.tokenization_")


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, list[int]]:
    """Ids of each distinct text, without special tokens of the tokenizer's own making. One call, so in parallel."""
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    if _is_plain(tokenizer):
        # Half the time of the same through transformers, which also makes offsets and masks that nobody reads.
        found = plain_backend(tokenizer).encode_batch_fast(unique, add_special_tokens=False)
        return {text: encoding.ids for text, encoding in zip(unique, found, strict=True)}
    # verbose=False: the warning about texts beyond the model's context does not know that max_length comes later.
    ids = tokenizer(unique, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return dict(zip(unique, ids, strict=True))


def encoder(tokenizer: Tokenizer, texts: Sequence[str]) -> Encode:
    """A function that gives the ids of each of `texts` at once, and of any other text when asked.

    A chat grows turn by turn, and its loss is placed by tokenising every stage of it: whole, that is quadratic work in
    the number of turns. But `tokenizers` cuts a text at special tokens before it does anything else, and tokenises what
    is between them apart. So texts are cut there, each part is tokenised once with the special token before it (which
    is how the tokenizer knows that it is not at the beginning), and the parts that texts share are shared.
    """
    borders = _borders(tokenizer)
    parts = {text: _cut_at(text, borders) for text in dict.fromkeys(texts)}
    known = encode_batch(tokenizer, [part for found in parts.values() for part in found])

    def encode(text: str) -> list[int]:
        found = parts.get(text)
        if found is None:
            return encode_batch(tokenizer, [text])[text]
        ids = list(known[found[0]])
        for part in found[1:]:
            head, *rest = known[part]
            if ids[-1:] != [head] or head not in borders.ids:  # cut where the tokenizer does not
                return encode_batch(tokenizer, [text])[text]
            ids += rest
        return ids

    return encode


@dataclass(frozen=True)
class _Borders:
    """Special tokens that a text is cut at: a pattern of their texts, the longest first, and their ids."""

    pattern: re.Pattern[str] | None
    ids: frozenset[int]


def _borders(tokenizer: Tokenizer) -> _Borders:
    if not _is_plain(tokenizer) or plain_backend(tokenizer).encode_special_tokens:
        return _Borders(None, frozenset())
    # Tokens that are looked for in normalised text are not: the text here is as it stands.
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if not token.normalized}
    texts = sorted(added.values(), key=len, reverse=True)
    return _Borders(re.compile("|".join(map(re.escape, texts))) if texts else None, frozenset(added))


def _cut_at(text: str, borders: _Borders) -> list[str]:
    """Parts that overlap in the special token one ends and the next begins with; that they share."""
    if borders.pattern is None:
        return [text]
    parts, start = [], 0
    for match in borders.pattern.finditer(text):
        if match.end() < len(text):
            parts.append(text[start : match.end()])
            start = match.start()
    return [*parts, text[start:]]


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


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """SHA-256 over everything that decides what a text becomes: vocabulary, rules, special tokens, chat template."""
    digest = hashlib.sha256()
    if tokenizer.is_fast:
        digest.update(plain_backend(tokenizer).to_str().encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(path.read_bytes())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, *map(str, tokenizer.all_special_tokens)]
    digest.update(json.dumps([type(tokenizer).__name__, tokenizer.chat_template, special]).encode())
    return digest.hexdigest()


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
