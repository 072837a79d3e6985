"""Talking to a model: one session with its history, and the loop that reads and answers.

Nothing here knows a terminal: lines come from a function and text goes to one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelab.errors import ConfigError, TunelabError, did_you_mean
from tunelab.types import Message

if TYPE_CHECKING:
    from tunelab.data.rendering import RenderName
    from tunelab.models.generation import Generation, GenerationSettings
    from tunelab.models.loaded import LoadedModel

Write = Callable[[str], None]

COMMANDS = {"/reset": "forget what was said", "/help": "this list", "/quit": "leave (also Ctrl-D)"}
_COMMAND = re.compile(r"/[a-z]*")


@dataclass
class ChatSession:
    """A model and what has been said. `render` is how turns are written (`data.render`, resolved for the model)."""

    loaded: LoadedModel
    render: RenderName
    settings: GenerationSettings
    system: str | None = None
    history: list[Message] = field(default_factory=list)

    def reply(self, text: str, write: Write | None = None) -> Generation:
        """Answer `text`, streaming the answer to `write`; both turns enter the history once the answer is whole.

        The seed moves on with every turn: a question asked twice may get two answers, and a session can be repeated.
        Raises ConfigError if the history no longer fits the model's context; the history then stays as it was.
        """
        from tunelab.data import render_prompt
        from tunelab.models.generation import generate

        question = Message("user", text)
        settings = replace(self.settings, seed=self.settings.seed + len(self.history))
        opening = (Message("system", self.system),) if self.system else ()
        ids = render_prompt((*opening, *self.history, question), self.loaded.tokenizer, self.render)
        on_text = None if write is None else lambda _, piece: write(piece)
        (answer,) = generate(self.loaded, [ids], settings, on_text)
        self.history += [question, Message("assistant", answer.text.strip())]
        return answer

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.history.clear()


def open_session(name: str, runs_dir: str, *, system: str | None, device: str, **sampling: Any) -> ChatSession:
    """Load a run's best model, or any model a recipe could name, ready to talk.

    `sampling` are fields of GenerationSettings. A run's turns are written as in its training data. Raises ConfigError
    if `name` is neither, or a sampling value is out of range.
    """
    from tunelab.config import parse_recipe
    from tunelab.data import stop_strings
    from tunelab.models.engine import choose_layout
    from tunelab.models.generation import GenerationSettings
    from tunelab.models.loading import load_model
    from tunelab.runs import RunFolder

    model: dict[str, Any] = {"name": name, "device": device}
    render: Any = "auto"
    try:
        run = RunFolder.open(name, runs_dir)
    except ConfigError:
        pass  # a model's name, then; load_model says what is wrong with it
    else:
        trained = run.recipe().model.model_dump()
        kept = ("trust_remote_code", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        model |= {"name": str(run.path), **{key: trained[key] for key in kept}}
        render = run.record()["data"]["train"]["session_render"]
    # Only the model section is used; validating a whole recipe gives its errors their key paths.
    config = parse_recipe({"model": model, "data": {"train": "-"}, "method": {"name": "sft"}}, source="chat").model
    if system is not None and render == "text":
        raise ConfigError(f"{name}: was trained on running text, which has no system message; leave --system out")
    loaded = load_model(config)
    choose_layout(loaded, config.layout, longest=0, kernels=config.kernels)
    render = _resolve(render, loaded)
    return ChatSession(loaded, render, GenerationSettings(stop=stop_strings(render), **sampling), system)


def _resolve(render: RenderName, loaded: LoadedModel) -> RenderName:
    if render != "auto":
        return render
    return "chat" if loaded.tokenizer.chat_template else "transcript"


def describe(session: ChatSession) -> str:
    """One line on who is talking."""
    loaded = session.loaded
    name = Path(loaded.source).name if Path(loaded.source).exists() else loaded.source
    return f"{name}: {loaded.num_parameters / 1e6:.3g} M parameters on {loaded.device.type}, turns as {session.render}"


def talk(session: ChatSession, read: Callable[[], str | None], write: Write) -> None:
    """Read, answer, repeat, until `read` returns None or /quit is said.

    A turn that cannot be answered is explained and the session goes on. KeyboardInterrupt while an answer is being
    written ends that answer only.
    """
    while (line := read()) is not None:
        text = line.strip()
        if not text:
            continue
        if _COMMAND.fullmatch(text):
            if text == "/quit":
                return
            write(_obey(session, text))
            continue
        try:
            session.reply(text, write)
            write("\n")
        except KeyboardInterrupt:
            write(" … (stopped)\n")
        except TunelabError as error:
            write(f"error: {error} (/reset forgets the session)\n")


def _obey(session: ChatSession, command: str) -> str:
    if command == "/reset":
        session.reset()
        return "The session starts anew.\n"
    if command == "/help":
        return "".join(f"{name:<8}{what}\n" for name, what in COMMANDS.items())
    return f"no command {command}{did_you_mean(command, COMMANDS) or '; /help lists them'}\n"


def answer_each(session: ChatSession, prompts: Iterable[str]) -> Iterator[tuple[str, Generation]]:
    """Answer each prompt by itself, none knowing of the others; empty ones are passed over."""
    for line in prompts:
        if prompt := line.strip():
            session.reset()
            yield prompt, session.reply(prompt)
