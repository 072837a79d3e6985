"""A session's history, its commands, and what ends it, with a model that answers from a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tunelab import data
from tunelab.chat import ChatSession, open_session, talk
from tunelab.errors import ConfigError
from tunelab.models import generation
from tunelab.models.generation import Generation, GenerationSettings
from tunelab.types import Message


@dataclass
class Fake:
    """Stands for the model: remembers what it was asked, answers in turn."""

    answers: list[Any]
    asked: list[tuple[Message, ...]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    tokenizer: Any = None

    def render(self, turns: Sequence[Message], tokenizer: Any, render: str) -> tuple[int, ...]:
        self.asked.append(tuple(turns))
        return (1,)

    def generate(
        self, loaded: Any, prompts: Any, settings: GenerationSettings, on_text: Callable[[int, str], None] | None
    ) -> list[Generation]:
        self.seeds.append(settings.seed)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        if on_text is not None:
            for piece in (answer[:2], answer[2:]):
                on_text(0, piece)
        return [Generation((1,), answer, "eos")]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> ChatSession:
    fake = Fake([])
    monkeypatch.setattr(data, "render_prompt", fake.render)
    monkeypatch.setattr(generation, "generate", fake.generate)
    return ChatSession(fake, "chat", GenerationSettings(seed=5), system="Be brief.")  # type: ignore[arg-type]


def converse(session: ChatSession, answers: list[Any], lines: list[str]) -> str:
    """What the session writes when a person types `lines`, then Ctrl-D."""
    session.loaded.answers[:] = answers  # type: ignore[attr-defined]
    typed, written = iter([*lines, None]), []
    talk(session, lambda: next(typed), written.append)
    return "".join(written)


def test_the_history_grows_and_the_system_message_leads(session: ChatSession) -> None:
    assert converse(session, [" Soup.", "Hot."], ["What?", "  And how? "]) == " Soup.\nHot.\n"
    system, first = Message("system", "Be brief."), Message("user", "What?")
    assert session.loaded.asked == [  # type: ignore[attr-defined]
        (system, first),
        (system, first, Message("assistant", "Soup."), Message("user", "And how?")),
    ]


def test_the_seed_moves_on_with_the_turns(session: ChatSession) -> None:
    """5 for the first turn; each answered turn adds two messages. After /reset it begins again."""
    converse(session, ["a", "b", "c"], ["x", "x", "/reset", "x"])
    assert session.loaded.seeds == [5, 7, 5]  # type: ignore[attr-defined]


def test_reset_forgets_and_quit_leaves(session: ChatSession) -> None:
    written = converse(session, ["a", "b"], ["x", "/reset", "y", "/quit", "never read"])
    assert written == "a\nThe session starts anew.\nb\n"
    assert session.loaded.asked[-1] == (Message("system", "Be brief."), Message("user", "y"))  # type: ignore[attr-defined]


def test_commands_are_single_words(session: ChatSession) -> None:
    assert converse(session, [], ["/rest"]) == "no command /rest (did you mean '/reset'?)\n"
    assert converse(session, [], ["/xyzzy"]) == "no command /xyzzy; /help lists them\n"
    assert "/reset  forget what was said\n" in converse(session, [], ["/help"])
    assert converse(session, ["A file."], ["/etc/hosts is what?", ""]) == "A file.\n"


def test_a_turn_that_fails_is_not_remembered(session: ChatSession) -> None:
    written = converse(session, [ConfigError("prompt 0 has 9000 tokens"), "ok"], ["long", "short"])
    assert written == "error: prompt 0 has 9000 tokens (/reset forgets the session)\nok\n"
    assert [turn.content for turn in session.history] == ["short", "ok"]


def test_ctrl_c_stops_an_answer_only(session: ChatSession) -> None:
    assert converse(session, [KeyboardInterrupt(), "ok"], ["x", "y"]) == " … (stopped)\nok\n"
    assert [turn.content for turn in session.history] == ["y", "ok"]


def test_ctrl_c_at_the_prompt_leaves(session: ChatSession) -> None:
    def read() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk(session, read, lambda text: None)


def test_a_base_model_stops_where_the_other_side_would_speak() -> None:
    """tiny-gpt2 has no chat template: turns are a transcript, and an answer ends before `\\n\\nHuman:`."""
    session = open_session("tiny-gpt2", "runs", system=None, device="cpu", max_new_tokens=4, temperature=0.0)
    assert session.render == "transcript"
    assert session.settings.stop == ("\n\nHuman:",)
    session.settings = replace(session.settings, max_new_tokens=2)
    assert len(session.reply("Hello").ids) <= 2


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        open_session("tiny-gpt2", "runs", system=None, device="cpu", temperature=-1.0)
    with pytest.raises(ConfigError, match=r"model\.device: 'gpu' is not one of auto, cpu, cuda, mps"):
        open_session("tiny-gpt2", "runs", system=None, device="gpu")
