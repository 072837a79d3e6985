"""hh-rlhf transcripts: `\\n\\nHuman: …\\n\\nAssistant: …` (Bai et al. 2022, github.com/anthropics/hh-rlhf).

The prompt of a transcript runs to the *last* `\\n\\nAssistant:`, including the colon and not the space after it; the
response keeps that leading space. GPT-2-like tokenizers join a space to the word after it, so this is where tokenising
the two sides apart gives the ids of the whole. (A common character prefix of chosen and rejected is not the prompt: in
13% of pairs it ends inside a word of the answer.)

Turns are written the same way: a system message, if any, stands before the first `\\n\\nHuman:` as plain text.
"""

from __future__ import annotations

from tunelab.data.problems import BadRecord
from tunelab.types import Message, Turns

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_ROLES = {HUMAN: "user", ASSISTANT: "assistant"}


def is_transcript_prompt(text: str) -> bool:
    """Whether `text` is the prompt side of a transcript: it opens with a Human turn and waits for the Assistant."""
    return text.startswith(HUMAN) and text.endswith(ASSISTANT)


def split_transcript(text: str, field: str) -> tuple[str, str]:
    """(prompt up to and with the last `\\n\\nAssistant:`, response with its leading space)."""
    if not text.startswith(HUMAN):
        raise BadRecord("transcript", f"{field}: expected a transcript that begins with {HUMAN!r}, got {text[:20]!r}")
    at = text.rfind(ASSISTANT)
    if at < 0:
        raise BadRecord("transcript", f"{field}: the transcript has no {ASSISTANT!r} turn")
    cut = at + len(ASSISTANT)
    return text[:cut], text[cut:]


def parse_prompt(prompt: str) -> Turns:
    """The turns of a transcript's prompt, without the waiting Assistant. One leading space of each turn is dropped."""
    turns: list[Message] = []
    rest = prompt.removesuffix(ASSISTANT)
    while rest:
        marker = HUMAN if rest.startswith(HUMAN) else ASSISTANT
        rest = rest[len(marker) :]
        ends = [at for at in (rest.find(HUMAN), rest.find(ASSISTANT)) if at >= 0]
        end = min(ends, default=len(rest))
        turns.append(Message(_ROLES[marker], rest[:end].removeprefix(" ")))
        rest = rest[end:]
    return tuple(turns)


def format_turn(message: Message, *, first: bool) -> str:
    """One turn as transcript text. Raises BadRecord for a system message that is not the first of its dialogue."""
    if message.role == "user":
        return f"{HUMAN} {message.content}"
    if message.role == "assistant":
        return f"{ASSISTANT} {message.content}"
    if not first:
        raise BadRecord("turns", "a transcript takes a system message at its beginning only; use a chat template")
    return message.content


def format_prompt(turns: Turns) -> str:
    """The turns as transcript text that waits for the Assistant."""
    return "".join(format_turn(turn, first=index == 0) for index, turn in enumerate(turns)) + ASSISTANT
