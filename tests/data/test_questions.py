"""`builtin:questions-mini` is what its script writes, and its answers are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.make_questions import CAPITALS, SPLITS, write
from tunelab.data import load_records
from tunelab.data.sources import _BUILTIN_FOLDER

SOURCE = "builtin:questions-mini"


def pairs(split: str) -> list[tuple[str, str]]:
    records = load_records(SOURCE, split=split).records
    return [(str(record.prompt), str(record.completion)) for record in records]  # type: ignore[union-attr]


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    for path in write(tmp_path):
        assert path.read_bytes() == (_BUILTIN_FOLDER / path.name).read_bytes()


def test_the_splits_share_no_question_and_no_country() -> None:
    train, test = pairs("train"), pairs("test")
    assert {"train": len(train), "test": len(test)} == SPLITS
    prompts = {prompt for prompt, _ in (*train, *test)}
    assert len(prompts) == sum(SPLITS.values())

    def countries(found: list[tuple[str, str]]) -> set[str]:
        text = "\n".join(prompt for prompt, _ in found if "capital" in prompt)
        return {country for country in CAPITALS if country in text}

    assert countries(train)
    assert countries(test)
    assert not countries(train) & countries(test)


@pytest.mark.parametrize("split", SPLITS)
def test_an_answer_follows_from_its_question(split: str) -> None:
    """Of a passage it is a word of it; of a sum, what its two numbers make; and it stands behind one space."""
    kinds = {"reading": 0, "arithmetic": 0, "capital": 0}
    for prompt, completion in pairs(split):
        assert prompt.endswith("\nAnswer:")
        assert re.fullmatch(r" \S.*", completion)
        answer = completion[1:]
        if prompt.startswith("Passage: "):
            kinds["reading"] += 1
            passage, question = prompt.split("\n")[:2]
            assert answer in passage
            assert answer not in question
        elif "capital" in prompt:
            kinds["capital"] += 1
            assert any(country in prompt and answer == capital for country, capital in CAPITALS.items())
        else:
            kinds["arithmetic"] += 1
            a, b = (int(number) for number in re.findall(r"\d+", prompt)[:2])
            assert int(answer) == _result(prompt, a, b)
    assert min(kinds.values()) >= 10, kinds


def _result(prompt: str, a: int, b: int) -> int:
    if "more" in prompt:
        return a + b
    if "eats" in prompt:
        return a - b
    if "box" in prompt:
        return a * b
    return a // b if "shares" in prompt else a * b - a
