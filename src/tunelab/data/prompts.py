"""Prompts to generate from: fixed records of a data set, and the turns of a chat session."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tunelab.data.dataset import Dataset
from tunelab.data.encoding import Tokenizer, beginning_of_sequence, encode_batch
from tunelab.data.loader import random_order
from tunelab.data.problems import BadRecord
from tunelab.data.rendering import RenderName, apply_template, as_turns, resolve_mode
from tunelab.data.transcripts import HUMAN, format_prompt, is_transcript_prompt
from tunelab.errors import DataError
from tunelab.types import Example, Turns


@dataclass(frozen=True)
class GenerationPrompt:
    """What a model is given (`ids`, and as `text`, special tokens included), and the data's own continuation."""

    ids: tuple[int, ...]
    text: str
    reference: str


def stop_strings(session_render: str) -> tuple[str, ...]:
    """What ends an answer beside the end-of-sequence token: in a transcript, the model beginning the other side's turn.

    `session_render` is `DataSummary.session_render`, or the mode a chat session writes its turns in.
    """
    return (HUMAN,) if session_render == "transcript" else ()


def generation_prompts(
    dataset: Dataset, tokenizer: Tokenizer, count: int, seed: int, max_prompt_length: int | None = None
) -> list[GenerationPrompt]:
    """Prompts of `count` fixed random records, or of all if there are fewer.

    Only prompts of at most `max_prompt_length` tokens are taken, so that the answer fits the model's context. A prompt
    ends where the last answer begins (in a chat: after the assistant's header); of a preference pair the
    reference is the chosen answer. A record without a prompt (running text, or loss on all tokens) is halved.
    """
    answers: dict[int, tuple[list[int], int]] = {}
    for index in random_order(len(dataset), seed):
        if len(answers) == count:
            break
        ids, start = _last_answer(dataset.examples[index])
        if max_prompt_length is None or start <= max_prompt_length:
            answers[int(index)] = (ids, start)
    found = []
    for _, (ids, start) in sorted(answers.items()):
        text = tokenizer.decode(ids[:start], clean_up_tokenization_spaces=False)
        reference = tokenizer.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append(GenerationPrompt(tuple(ids[:start]), text, reference))
    return found


def _last_answer(example: Example) -> tuple[list[int], int]:
    """(ids of prompt and first completion, where the last span of loss begins)."""
    completion = example.completions[0]
    ids: list[int] = np.concatenate((example.prompt_ids, completion.ids)).tolist()
    if not len(example.prompt_ids):
        return ids, len(ids) // 2
    last = int(np.flatnonzero(completion.loss_mask)[-1])
    silent = np.flatnonzero(~completion.loss_mask[: last + 1])
    start = int(silent[-1]) + 1 if len(silent) else 0
    return ids, len(example.prompt_ids) + start


def render_prompt(prompt: Turns | str, tokenizer: Tokenizer, render: RenderName) -> tuple[int, ...]:
    """Ids after which the model speaks, written as `prepare` writes prompts. For a session pass the whole history.

    Raises DataError if the chat template refuses the turns, ConfigError if `render` cannot be had.
    """
    mode = resolve_mode(not isinstance(prompt, str), tokenizer, render)
    try:
        if mode == "chat":
            text = apply_template(tokenizer, as_turns(prompt), invite=True)
        elif mode == "transcript" and not (isinstance(prompt, str) and is_transcript_prompt(prompt)):
            text = format_prompt(as_turns(prompt))
        else:
            assert isinstance(prompt, str)
            text = prompt
    except BadRecord as bad:
        raise DataError(bad.message) from None
    ids = encode_batch(tokenizer, [text])[text]
    bos = [] if mode == "chat" else beginning_of_sequence(tokenizer)
    return tuple(ids if ids[: len(bos)] == bos else bos + ids)
