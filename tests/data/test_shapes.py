"""One record of each shape, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunelab.data import load_records
from tunelab.data.transcripts import format_prompt, parse_prompt
from tunelab.types import Conversation, Message, Origin, PlainText, PreferencePair, PromptCompletion, Record

SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "Q?"), Message("assistant", "A.")
WORSE = Message("assistant", "B.")
RAW_USER, RAW_ANSWER, RAW_WORSE = ({"role": m.role, "content": m.content} for m in (USER, ANSWER, WORSE))
HERE = Origin("a.jsonl", 1)

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

SHAPES: dict[str, tuple[dict[str, Any], Record]] = {
    "messages": ({"messages": [RAW_USER, RAW_ANSWER]}, Conversation((USER, ANSWER), HERE)),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Q?"},
                {"from": "gpt", "value": "A."},
            ]
        },
        Conversation((SYSTEM, USER, ANSWER), HERE),
    ),
    "prompt+completion": ({"prompt": "Q?", "completion": " A."}, PromptCompletion("Q?", " A.", None, HERE)),
    "prompt+completion (messages)": (
        {"prompt": [RAW_USER], "completion": [RAW_ANSWER]},
        PromptCompletion((USER,), (ANSWER,), None, HERE),
    ),
    "prompt+completion+label": (
        {"prompt": "Q?", "completion": "A.", "label": False},
        PromptCompletion("Q?", "A.", False, HERE),
    ),
    "prompt+completion+label (messages)": (
        {"prompt": [RAW_USER], "completion": [RAW_ANSWER], "label": True},
        PromptCompletion((USER,), (ANSWER,), True, HERE),
    ),
    "prompt+chosen+rejected": (
        {"prompt": "Q?", "chosen": "A.", "rejected": "B."},
        PreferencePair("Q?", "A.", "B.", HERE),
    ),
    "prompt+chosen+rejected (messages)": (
        {"prompt": [RAW_USER], "chosen": [RAW_ANSWER], "rejected": [RAW_WORSE]},
        PreferencePair((USER,), (ANSWER,), (WORSE,), HERE),
    ),
    "chosen+rejected (messages)": (
        {"chosen": [RAW_USER, RAW_ANSWER], "rejected": [RAW_USER, RAW_WORSE]},
        PreferencePair((USER,), (ANSWER,), (WORSE,), HERE),
    ),
    "hh-transcripts": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Q?\n\nAssistant: A. Human: no",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Q?\n\nAssistant: B.",
        },
        PreferencePair("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Q?\n\nAssistant:", " A. Human: no", " B.", HERE),
    ),
    "text": ({"text": "Once upon a time"}, PlainText("Once upon a time", HERE)),
    "alpaca": (
        {"instruction": "Use {braces}.", "input": "x", "output": "{x}"},
        PromptCompletion(
            ALPACA_INPUT + "\n\n### Instruction:\nUse {braces}.\n\n### Input:\nx\n\n### Response:", "{x}", None, HERE
        ),
    ),
}


def load(tmp_path: Path, *raw: dict[str, Any]) -> Any:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw), encoding="utf-8")
    return load_records("a.jsonl")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name: str, tmp_path: Path) -> None:
    raw, expected = SHAPES[name]
    records = load(tmp_path, raw)
    assert records.shape == name
    assert records.records == (expected,)
    assert records.ignored_columns == ()


@pytest.mark.parametrize(
    "raw", [{"instruction": "Do.", "input": "", "output": "Done."}, {"instruction": "Do.", "output": "Done."}]
)
def test_alpaca_without_input(raw: dict[str, Any], tmp_path: Path) -> None:
    (record,) = load(tmp_path, raw).records
    assert record.prompt == ALPACA + "\n\n### Instruction:\nDo.\n\n### Response:"
    assert record.completion == "Done."


def test_other_columns_are_ignored_and_listed(tmp_path: Path) -> None:
    message = RAW_USER | {"name": "Ada", "weight": 0}
    records = load(
        tmp_path, {"messages": [message, RAW_ANSWER], "id": 1}, {"messages": [RAW_USER, RAW_ANSWER], "score": None}
    )
    assert records.ignored_columns == ("id", "messages[].name", "messages[].weight", "score")


def test_the_most_specific_shape_wins(tmp_path: Path) -> None:
    raw = {"text": "t", "messages": [], "prompt": "Q?", "completion": "C", "chosen": "A.", "rejected": "B."}
    records = load(tmp_path, raw)
    assert records.shape == "prompt+chosen+rejected"
    assert records.ignored_columns == ("completion", "messages", "text")


def test_a_blank_system_message_is_kept(tmp_path: Path) -> None:
    """With many templates it switches a default system message off."""
    (record,) = load(tmp_path, {"messages": [{"role": "system", "content": ""}, RAW_USER, RAW_ANSWER]}).records
    assert record.messages[0] == Message("system", "")


def test_transcript_prompts_and_turns() -> None:
    prompt = "\n\nHuman: Hi\n\nAssistant: Yes?\nSure.\n\nHuman:  two spaces \n\nAssistant:"
    turns = parse_prompt(prompt)
    assert turns == (Message("user", "Hi"), Message("assistant", "Yes?\nSure."), Message("user", " two spaces "))
    assert format_prompt(turns) == prompt
    assert parse_prompt("\n\nHuman:\n\nAssistant:") == (Message("user", ""),)
    assert format_prompt((SYSTEM, USER)) == "Be brief.\n\nHuman: Q?\n\nAssistant:"
