"""Records → text, in pieces that carry loss or do not.

Three ways to write a dialogue (`data.render`):

- `chat`: the tokenizer's chat template. Transcripts are parsed into turns first; a plain prompt is one user message.
- `transcript`: `\\n\\nHuman: …\\n\\nAssistant: …`. EOS stands at the very end only, as in hh-rlhf: there the
  earlier answers of a prompt are not followed by EOS, and a chat session's history must look like what was trained on.
- `text`: prompt and completion as they stand, EOS after the completion.

`auto` is `chat` for turns if the tokenizer has a template, else `transcript`; text stays as it stands. Running text
(`text` records) has no turns and always stands as it is.

Where the loss lies in a chat. An answer's loss covers what the model itself must produce: from the end of the header
that invites it to speak (what `add_generation_prompt` writes) through the special token that ends the turn. It does not
cover the header, nor the white space that some templates (ChatML) put after the ending token: generation has stopped
before it, and the next turn brings it along. Where those places are is found by rendering, not by knowing templates:
messages[:i] with the generation prompt must be a prefix of messages[:i+1], and that of the whole dialogue. A template
that breaks this (drops earlier reasoning, say) cannot be masked exactly and is refused.

A template whose answers end with no special token gets EOS after the last one, so that the model learns to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunelab.data.encoding import Tokenizer
from tunelab.data.problems import BadRecord
from tunelab.data.transcripts import format_prompt, format_turn, is_transcript_prompt, parse_prompt
from tunelab.errors import ConfigError
from tunelab.types import Conversation, Message, PlainText, PreferencePair, PromptCompletion, Record, Turns

RenderName = Literal["auto", "chat", "transcript", "text"]
RenderMode = Literal["chat", "transcript", "text"]


@dataclass(frozen=True)
class Piece:
    """Consecutive text, and whether it carries loss."""

    text: str
    loss: bool


@dataclass(frozen=True)
class Answer:
    """What follows the prompt: pieces, the first of which carries loss, then EOS if `eos`."""

    pieces: tuple[Piece, ...]
    eos: bool


@dataclass(frozen=True)
class Rendered:
    """A record as text: everything before the first loss, once, and the answers that continue it."""

    prompt: str
    answers: tuple[Answer, ...]


def resolve_render(record: Record, tokenizer: Tokenizer, render: RenderName) -> RenderMode:
    """The mode for a set of records like `record`. Raises ConfigError for one that cannot be had."""
    if isinstance(record, PlainText):
        return "text"
    return resolve_mode(isinstance(sides(record)[0], tuple), tokenizer, render)


def resolve_mode(is_turns: bool, tokenizer: Tokenizer, render: RenderName) -> RenderMode:
    """`resolve_render` for turns, or for text."""
    if render == "auto":
        if not is_turns:
            return "text"
        return "chat" if tokenizer.chat_template else "transcript"
    if render == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "data.render: chat, but the tokenizer has no chat template; "
            "set transcript or text, or model.tokenizer to one that has"
        )
    if render == "text" and is_turns:
        raise ConfigError("data.render: text, but the records are messages; set chat, transcript or auto")
    return render


def sides(record: Record) -> tuple[str | Turns, tuple[str | Turns, ...]]:
    """(prompt, completions). Of a conversation: the turns before the first answer, and those from it on."""
    if isinstance(record, PreferencePair):
        return record.prompt, (record.chosen, record.rejected)
    if isinstance(record, PromptCompletion):
        return record.prompt, (record.completion,)
    if isinstance(record, Conversation):
        first = next(index for index, turn in enumerate(record.messages) if turn.role == "assistant")
        return record.messages[:first], (record.messages[first:],)
    return "", (record.text,)


def render_record(
    record: Record, tokenizer: Tokenizer, mode: RenderMode, endings: tuple[str, ...], *, last_only: bool
) -> Rendered:
    """A record as text with its loss. `last_only`: loss on the last assistant turn, not on all of the completion's.

    endings: `turn_endings`, which take too long to be looked up for each record.

    Raises BadRecord if the chat template refuses the turns or does not keep earlier ones as they were.
    """
    prompt, completions = sides(record)
    if mode == "text" or (mode == "transcript" and isinstance(prompt, str)):
        assert isinstance(prompt, str)
        head, space = _as_prompt(prompt, mode)
        return Rendered(head, tuple(Answer((Piece(f"{space}{text}", True),), True) for text in completions))
    context = as_turns(prompt)
    heads, answers = [], []
    for completion in completions:
        turns = _answer_turns(prompt, completion)
        whole, loss_turns = (*context, *turns), _loss_turns(len(context), turns, last_only)
        if mode == "chat":
            head, answer = _chat_pieces(tokenizer, whole, loss_turns, endings)
        else:
            head, answer = _transcript_pieces(whole, loss_turns)
        heads.append(head)
        answers.append(answer)
    return Rendered(heads[0], tuple(answers))


def _as_prompt(prompt: str, mode: RenderMode) -> tuple[str, str]:
    """(prompt text, what stands between it and the completion) for sides that are plain text."""
    if mode == "transcript" and not is_transcript_prompt(prompt):
        return format_prompt((Message("user", prompt),)), " "
    return prompt, ""


def as_turns(prompt: str | Turns) -> Turns:
    """Turns as they are, a transcript's prompt parsed, any other text as one user message."""
    if not isinstance(prompt, str):
        return prompt
    return parse_prompt(prompt) if is_transcript_prompt(prompt) else (Message("user", prompt),)


def _answer_turns(prompt: str | Turns, completion: str | Turns) -> Turns:
    if not isinstance(completion, str):
        return completion
    if isinstance(prompt, str) and is_transcript_prompt(prompt):
        completion = completion.removeprefix(" ")
    return (Message("assistant", completion),)


def _loss_turns(offset: int, completion: Turns, last_only: bool) -> list[int]:
    answers = [offset + index for index, turn in enumerate(completion) if turn.role == "assistant"]
    return answers[-1:] if last_only else answers


# --- transcripts ---------------------------------------------------------------------------------------------------


def _transcript_pieces(turns: Turns, loss_turns: Sequence[int]) -> tuple[str, Answer]:
    pieces: list[Piece] = []
    start = 0
    for index in loss_turns:
        before = "".join(format_turn(turn, first=at == 0) for at, turn in enumerate(turns[:index]) if at >= start)
        pieces += [Piece(before + format_prompt(()), False), Piece(f" {turns[index].content}", True)]
        start = index + 1
    return pieces[0].text, Answer(tuple(pieces[1:]), True)


# --- chat templates ------------------------------------------------------------------------------------------------


def apply_template(tokenizer: Tokenizer, turns: Turns, *, invite: bool) -> str:
    """The dialogue as the chat template writes it; `invite` adds the header after which the assistant speaks.

    Raises BadRecord if the template refuses it (roles that must alternate, no system message, …).
    """
    import jinja2

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=invite)
    except jinja2.TemplateError as error:
        raise BadRecord("template", f"the chat template refuses these turns: {error}") from None
    return text


def _chat_pieces(
    tokenizer: Tokenizer, turns: Turns, loss_turns: Sequence[int], endings: tuple[str, ...]
) -> tuple[str, Answer]:
    whole = apply_template(tokenizer, turns, invite=False)
    pieces: list[Piece] = []
    position, ended = 0, False
    for index in loss_turns:
        before = apply_template(tokenizer, turns[:index], invite=True)
        is_last = index == len(turns) - 1
        after = whole if is_last else apply_template(tokenizer, turns[: index + 1], invite=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise BadRecord(
                "template",
                f"message [{index}]: the chat template does not keep earlier turns as they were, so the loss cannot be "
                "placed exactly; train on the last answer only (method.loss_on: last_completion), or use "
                "data.render: transcript",
            )
        end, ended = _end_of_turn(after, len(before), endings)
        pieces += [Piece(whole[position : len(before)], False), Piece(whole[len(before) : end], True)]
        position = end
    return pieces[0].text, Answer(tuple(pieces[1:]), eos=not ended)


def turn_endings(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokenizer's special tokens as text, which may end a turn: the named ones and the added ones marked so."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted(token.rstrip() for token in {*tokenizer.all_special_tokens, *added} if token.strip()))


def _end_of_turn(text: str, start: int, endings: tuple[str, ...]) -> tuple[int, bool]:
    """(where the answer text[start:] ends, whether a special token ends it), white space after that token left out."""
    body = text[start:].rstrip()
    return (start + len(body), True) if body.endswith(endings) else (len(text), False)
