"""Records → tokenised examples with their loss masks: the second half of this room."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tunelab.data.cutting import cut_example
from tunelab.data.encoding import (
    Encode,
    Tokenizer,
    beginning_of_sequence,
    encode_batch,
    encode_pieces,
    end_of_sequence,
    prefixes,
)
from tunelab.data.problems import BadRecord, Problem
from tunelab.data.records import RecordSet
from tunelab.data.rendering import Answer, Rendered, RenderMode, RenderName, render_record, resolve_render
from tunelab.data.summary import DataSummary, Listed, compute_lengths, compute_padded_tokens
from tunelab.data.transcripts import is_transcript_prompt
from tunelab.errors import DataError
from tunelab.types import Completion, Example, Origin, PlainText, PreferencePair, PromptCompletion, Record

Method = Literal["sft", "dpo"]
LossOn = Literal["completions", "last_completion", "all"]

_CHUNK = 1024
"""Records tokenised in one call: enough for the tokenizer's threads, little enough to keep in memory twice."""


@dataclass(frozen=True)
class Dataset:
    """What a run trains on or is measured with. `fingerprint`: SHA-256 of all token ids and loss masks, in order."""

    examples: tuple[Example, ...]
    summary: DataSummary
    fingerprint: str

    def __len__(self) -> int:
        return len(self.examples)


def prepare(
    records: RecordSet,
    tokenizer: Tokenizer,
    *,
    method: Method,
    render: RenderName = "auto",
    loss_on: LossOn = "completions",
    max_length: int = 512,
    batch_size: int = 8,
) -> Dataset:
    """Render, tokenise and cut.

    `sft` trains on completions: of preference pairs on the chosen one, of labelled records on the desirable ones.
    `dpo` needs preference pairs, and reads `loss_on` "completions" alone. `loss_on="all"` puts loss on the prompt as
    well, and running text always has it there: such an example has no prompt, and no loss on its first token, which
    nothing predicts. `batch_size` is that of the padded computation `summary.padded_tokens` compares with.

    Raises DataError if the records do not suit the method, if a chat template refuses one of them (with
    `on_error="skip"` it is listed instead), or if nothing remains; ConfigError if `render` cannot be had.
    """
    if method == "dpo" and loss_on != "completions":
        raise ValueError("dpo reads loss_on='completions' only")
    used, excluded = _select(records, method)
    mode = resolve_render(used[0], tokenizer, render)
    rendered, refused = _render_all(used, tokenizer, mode, records.on_error, last_only=loss_on == "last_completion")
    everywhere = loss_on == "all" or isinstance(used[0], PlainText)
    examples, dropped = _cut_all(_tokenise(rendered, tokenizer, mode), max_length, everywhere)
    if not examples:
        raise DataError(
            f"{records.source}: nothing left to train on: {len(refused)} records skipped, "
            f"{len(dropped)} without an answer token within data.max_length {max_length}"
        )
    padded = compute_padded_tokens(examples, batch_size)
    total = sum(example.num_tokens for example in examples)
    summary = DataSummary(
        source=records.source,
        split=records.split,
        shape=records.shape,
        method=method,
        render=mode,
        session_render=_session_render(used[0], mode),
        loss_on=loss_on,
        max_length=max_length,
        records=len(records.records) + len(records.skipped),
        used=len(examples),
        skipped=Listed.of(problem.origin for problem in (*records.skipped, *refused)),
        excluded=Listed.of(excluded),
        dropped=Listed.of(dropped),
        prompts_cut=Listed.of(e.origin for e in examples if e.prompt_cut),
        completions_cut=Listed.of(e.origin for e in examples if any(c.cut for c in e.completions)),
        ignored_columns=records.ignored_columns,
        lengths=compute_lengths(examples, ("chosen", "rejected") if method == "dpo" else ("completion",)),
        total_tokens=total,
        loss_tokens=sum(int(c.loss_mask.sum()) for e in examples for c in e.completions),
        padded_tokens=padded,
        padded_batch_size=batch_size,
        padding_avoided=round(1 - total / padded, 4),
    )
    return Dataset(tuple(examples), summary, _fingerprint(examples))


def _select(records: RecordSet, method: Method) -> tuple[list[Record], list[Origin]]:
    """(records the method trains on, origins of those it leaves out)."""
    used: list[Record] = []
    excluded: list[Origin] = []
    for record in records.records:
        if method == "dpo":
            if not isinstance(record, PreferencePair):
                raise DataError(
                    f"{records.source}: method dpo needs preference pairs (fields chosen and rejected), and the "
                    f"records are {records.shape}; train on them with method sft, or give pairs"
                )
            used.append(record)
        elif isinstance(record, PreferencePair):
            used.append(PromptCompletion(record.prompt, record.chosen, None, record.origin))
        elif isinstance(record, PromptCompletion) and record.label is False:
            excluded.append(record.origin)
        else:
            used.append(record)
    if not used:
        raise DataError(f"{records.source}: nothing to train on: all {len(excluded)} records are labelled false")
    return used, excluded


def _render_all(
    records: Sequence[Record], tokenizer: Tokenizer, mode: RenderMode, on_error: str, *, last_only: bool
) -> tuple[list[tuple[Origin, Rendered]], list[Problem]]:
    rendered: list[tuple[Origin, Rendered]] = []
    refused: list[Problem] = []
    for record in records:
        try:
            rendered.append((record.origin, render_record(record, tokenizer, mode, last_only=last_only)))
        except BadRecord as bad:
            problem = bad.at(record.origin)
            if on_error == "raise":
                raise problem.error() from None
            refused.append(problem)
    return rendered, refused


def _tokenise(
    rendered: Sequence[tuple[Origin, Rendered]], tokenizer: Tokenizer, mode: RenderMode
) -> Iterator[tuple[Origin, np.ndarray, list[Completion]]]:
    """(origin, prompt ids, completions) of each record, uncut."""
    eos = end_of_sequence(tokenizer)
    bos = [] if mode == "chat" else beginning_of_sequence(tokenizer)  # a chat template writes its own

    for start in range(0, len(rendered), _CHUNK):
        chunk = rendered[start : start + _CHUNK]
        texts = [text for _, record in chunk for pieces in _piece_texts(record) for text in prefixes(pieces)]
        known = encode_batch(tokenizer, texts)

        def encode(text: str, known: dict[str, list[int]] = known) -> list[int]:
            return known[text] if text in known else encode_batch(tokenizer, [text])[text]

        for origin, record in chunk:
            prompt = encode(record.prompt)
            if prompt[: len(bos)] != bos:
                prompt = bos + prompt
            completions = [_completion(record.prompt, answer, encode, eos) for answer in record.answers]
            yield origin, np.asarray(prompt, np.int32), completions


def _piece_texts(record: Rendered) -> list[list[str]]:
    return [[record.prompt, *(piece.text for piece in answer.pieces)] for answer in record.answers]


def _completion(prompt: str, answer: Answer, encode: Encode, eos: int) -> Completion:
    ids: list[int] = []
    mask: list[bool] = []
    pieces = encode_pieces([prompt, *(piece.text for piece in answer.pieces)], encode)[1:]
    for piece, piece_ids in zip(answer.pieces, pieces, strict=True):
        ids += piece_ids
        mask += [piece.loss] * len(piece_ids)
    if answer.eos and ids[-1:] != [eos]:  # the data may have written it out
        ids.append(eos)
        mask.append(True)
    return Completion(np.asarray(ids, np.int32), np.asarray(mask, bool))


def _cut_all(
    tokenised: Iterator[tuple[Origin, np.ndarray, list[Completion]]], max_length: int, everywhere: bool
) -> tuple[list[Example], list[Origin]]:
    """(examples, origins of those left without loss). `everywhere`: loss on the prompt too."""
    examples: list[Example] = []
    dropped: list[Origin] = []
    for origin, prompt_ids, completions in tokenised:
        if everywhere:
            prompt_ids, completions = prompt_ids[:0], [_whole(prompt_ids, completion) for completion in completions]
        if not len(prompt_ids):
            completions = [_unpredicted(completion) for completion in completions]
        example = cut_example(prompt_ids, completions, max_length, origin)
        if example is None:
            dropped.append(origin)
        else:
            examples.append(example)
    return examples, dropped


def _whole(prompt_ids: np.ndarray, completion: Completion) -> Completion:
    """Prompt and completion as one completion with loss on every token."""
    ids = np.concatenate((prompt_ids, completion.ids))
    return replace(completion, ids=ids, loss_mask=np.ones(len(ids), bool))


def _unpredicted(completion: Completion) -> Completion:
    """Without a prompt nothing predicts the first token, so it carries no loss."""
    mask = completion.loss_mask.copy()
    mask[:1] = False
    return replace(completion, loss_mask=mask)


def _session_render(record: Record, mode: RenderMode) -> RenderMode:
    prompt = getattr(record, "prompt", "")
    return "transcript" if mode == "text" and is_transcript_prompt(prompt) else mode


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        sizes = [len(example.prompt_ids), *(len(completion.ids) for completion in example.completions)]
        digest.update(np.asarray([len(sizes), *sizes], "<i4").tobytes())
        digest.update(example.prompt_ids.astype("<i4").tobytes())
        for completion in example.completions:
            digest.update(completion.ids.astype("<i4").tobytes())
            digest.update(completion.loss_mask.tobytes())
    return digest.hexdigest()
