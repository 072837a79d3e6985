"""Malformed input, one row a case: exit code 3, one line, the place, what was wrong and what was expected."""

# ruff: noqa: E501  (one row a case)
from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunelab.data import load_records
from tunelab.errors import EXIT_DATA, DataError

PAIR = {"prompt": "Q?", "chosen": "good", "rejected": "bad"}
HH = {"chosen": "\n\nHuman: Q?\n\nAssistant: good", "rejected": "\n\nHuman: Q?\n\nAssistant: bad"}
DONE = {"prompt": "Q?", "completion": "A."}
USER, ANSWER = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
CHAT = {"messages": [USER, ANSWER]}


def lines(*records: Any) -> bytes:
    """JSON Lines; bytes stand for themselves."""
    return b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records) + b"\n"


def parquet(columns: dict[str, list[Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def turns(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


GOOD_PARQUET = parquet({"prompt": ["Q?"] * 50, "completion": ["A."] * 50})

# Each bad record stands on line 2, behind a good one of the same shape.
BAD_RECORDS: dict[str, tuple[Any, Any, str, str]] = {
    # name: (good record, bad line, kind, message)
    "JSON cut short": (DONE, b'{"prompt": "Q?", "comp', "json", "not JSON: Unterminated string"),
    "JSON with a trailing comma": (DONE, b'{"prompt": "Q?",}', "json", "not JSON:"),
    "single quotes": (DONE, b"{'prompt': 'Q?'}", "json", "not JSON:"),
    "two objects on a line": (DONE, lines(DONE)[:-1] * 2, "json", "not JSON: Extra data"),
    "NaN": (DONE, b'{"prompt": "Q?", "completion": "A.", "score": NaN}', "json", "NaN is not JSON"),
    "a number of 5000 digits": (DONE, b'{"n": ' + b"9" * 5000 + b"}", "json", "not readable as JSON"),
    "a hundred thousand brackets": (DONE, b"[" * 100_000, "json", "nested too deeply"),
    "a key twice": (DONE, b'{"prompt": "a", "prompt": "b", "completion": "c"}', "json", "key 'prompt' appears twice"),
    "a list, not an object": (DONE, b'["Q?", "A."]', "json", "expected a JSON object {…}, got a list"),
    "a bare string": (DONE, b'"Q?"', "json", "expected a JSON object {…}, got text"),
    "a bare null": (DONE, b"null", "json", "expected a JSON object {…}, got null"),
    "not UTF-8": (DONE, b'{"prompt": "caf\xe9", "completion": "A."}', "encoding", "byte 0xe9 at column 16"),
    "NUL bytes": (DONE, b"\0\0\0\0", "encoding", "NUL byte at column 1"),
    "NUL escaped": (DONE, DONE | {"completion": "a\0b"}, "encoding", "completion: NUL character at position 2"),
    "half a surrogate pair": (DONE, b'{"prompt": "\\ud83d", "completion": "A."}', "encoding", "prompt: \\ud83d is half"),
    "a missing field": (DONE, {"prompt": "Q?"}, "field", "field 'completion' is missing"),
    "a misspelt field": (DONE, {"prompt": "Q?", "completon": "A."}, "field", "missing (did you mean 'completon'?)"),
    "a number for text": (DONE, DONE | {"completion": 42}, "field", "completion: expected text, got number 42"),
    "a number for the prompt": (PAIR, PAIR | {"prompt": 1.5}, "field", "prompt: expected text, got number 1.5"),
    "true for text": (DONE, DONE | {"completion": True}, "field", "completion: expected text, got true"),
    "null for text": (DONE, DONE | {"prompt": None}, "field", "prompt: expected text, got null"),
    "an object for text": (DONE, DONE | {"completion": {}}, "field", "completion: expected text, got an object"),
    "text and messages": (DONE, DONE | {"completion": [ANSWER]}, "field", "completion: expected text as in 'prompt'"),
    "messages and text": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "B"}]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": "B"},
        "field",
        "rejected: expected a list of messages as in 'prompt', got text",
    ),
    "an empty completion": (DONE, DONE | {"completion": ""}, "empty", "completion: empty; expected text"),
    "a blank completion": (DONE, DONE | {"completion": " \n\t"}, "empty", "completion: empty"),
    "an empty prompt": (DONE, DONE | {"prompt": ""}, "empty", "prompt: empty"),
    "an empty rejected": (PAIR, PAIR | {"rejected": " "}, "empty", "rejected: empty"),
    "an identical pair": (PAIR, PAIR | {"rejected": "good"}, "identical", "chosen and rejected are identical"),
    "identical transcripts": (HH, HH | {"rejected": HH["chosen"]}, "identical", "identical"),
    "transcripts of two prompts": (
        HH, HH | {"rejected": "\n\nHuman: X?\n\nAssistant: bad"}, "prompts-differ", "differ from character 10: 'Q?",
    ),
    "no Human at the beginning": (HH, HH | {"chosen": "Q?\n\nAssistant: good"}, "transcript", r"begins with '\n\nHuman:'"),
    "no Assistant": (HH, HH | {"rejected": "\n\nHuman: Q?"}, "transcript", r"rejected: the transcript has no '\n\nAss"),
    "an empty response": (HH, HH | {"rejected": "\n\nHuman: Q?\n\nAssistant: "}, "empty", "rejected: empty response"),
    "no messages": (CHAT, turns(), "empty", "messages: the list of messages is empty"),
    "messages as text": (CHAT, {"messages": "Q?"}, "field", "messages: expected a list of messages, got text"),
    "a message as text": (CHAT, turns(USER, "A."), "field", "messages[1]: expected an object with 'role' and 'content'"),
    "no role": (CHAT, turns(USER, {"rol": "x", "content": "A."}), "field", "'role' is missing (did you mean 'rol'?)"),
    "no content": (CHAT, turns(USER, {"role": "assistant"}), "field", "messages[1]: field 'content' is missing"),
    "null content": (CHAT, turns(USER, ANSWER | {"content": None}), "field", "[1].content: expected text, got null"),
    "blank content": (CHAT, turns(USER, ANSWER | {"content": " "}), "empty", "messages[1].content: empty"),
    "an unknown role": (
        CHAT, turns(USER, ANSWER | {"role": "asistant"}), "role",
        "messages[1].role: unknown role 'asistant' (did you mean 'assistant'?); expected system, user, assistant",
    ),
    "a tool's role": (CHAT, turns(USER, {"role": "tool", "content": "4"}, ANSWER), "role", "unknown role 'tool'"),
    "a role of several lines": (
        CHAT, turns(USER, {"role": "a\n\x1b[31m" + "b" * 10_000, "content": "4"}), "role", "unknown role 'a\\n\\x1b[31mbbb",
    ),
    "no assistant turn": (CHAT, turns(USER, USER), "turns", "messages: no assistant turn to learn from"),
    "the user speaks last": (CHAT, turns(USER, ANSWER, USER), "turns", "expected the assistant to speak last, got user"),
    "a completion by the user": (
        {"prompt": [USER], "completion": [ANSWER]}, {"prompt": [USER], "completion": [USER]}, "turns",
        "completion[0]: expected an assistant message, got user",
    ),
    "dialogues of two prompts": (
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "B"}]},
        {"chosen": [USER, ANSWER], "rejected": [{"role": "user", "content": "R?"}, ANSWER]},
        "prompts-differ",
        "differ from message [0]",
    ),
    "a dialogue without prompt": (
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "B"}]},
        {"chosen": [ANSWER], "rejected": [ANSWER | {"content": "B"}]},
        "turns",
        "chosen: no message before the answer",
    ),
    "a sharegpt role": (
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gtp", "value": "A."}]},
        "role",
        "conversations[1].from: unknown role 'gtp' (did you mean 'gpt'?); expected system, human, gpt",
    ),
    "a label of 1": (DONE | {"label": True}, DONE | {"label": 1}, "field", "label: expected true or false, got number 1"),
    "an alpaca input of null": (
        {"instruction": "Do", "output": "Done"}, {"instruction": "Do", "input": None, "output": "Done"}, "field",
        "input: expected text, got null",
    ),
    "blank running text": ({"text": "words"}, {"text": "\n"}, "empty", "text: empty"),
    "mixed shapes": (DONE, PAIR, "mixed-shapes", "this record is prompt+chosen+rejected, the ones before it are prompt+com"),
    "mixed forms": (
        DONE, {"prompt": [USER], "completion": [ANSWER]}, "mixed-shapes", "this record is prompt+completion (messages)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record(name: str, tmp_path: Path) -> None:
    good, bad, kind, message = BAD_RECORDS[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(good, bad, good))
    with pytest.raises(DataError) as caught:
        load_records(str(path))
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ")
    assert message in text
    assert "\n" not in text
    assert caught.value.exit_code == EXIT_DATA

    records = load_records(str(path), on_error="skip")
    assert [record.origin.line for record in records.records] == [1, 3]
    (problem,) = records.skipped
    assert (problem.origin.line, problem.kind) == (2, kind)
    assert message in problem.message


# What no record can be blamed for raises under both settings.
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    # name: (file name, bytes, message after the path)
    "an empty file": ("a.jsonl", b"", ": empty file; expected at least one record"),
    "blank lines only": ("a.jsonl", b"\n \n", ": empty file"),
    "an empty list": ("a.json", b"[]", ": empty file"),
    "an empty .json": ("a.json", b"", ": empty file"),
    "UTF-16": ("a.jsonl", json.dumps(DONE).encode("utf-16"), ": encoded as UTF-16; save it as UTF-8"),
    "an unknown shape": ("a.jsonl", lines({"foo": 1}), ": no known record shape in fields 'foo'; expected "),
    "a misspelt shape": ("a.jsonl", lines({"mesages": []}), "(did you mean 'messages'?)"),
    "half a shape": (
        "a.jsonl", lines({"prompt": "Q?", "choosen": "A", "rejected": "B"}),
        "prompt+chosen+rejected also needs 'chosen' (did you mean 'choosen'?)",
    ),
    "an object without fields": ("a.jsonl", lines({}), ": no known record shape in fields none"),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(lines(*[DONE] * 500))[:-20], ": the gzip data is cut short here"),
    "gzip cut in its header": ("a.jsonl.gz", gzip.compress(lines(DONE))[:5], ":1: the gzip data is cut short here"),
    "gzip of nothing": ("a.jsonl.gz", b"", ": empty file; expected gzip data"),
    "no gzip at all": ("a.jsonl.gz", lines(DONE), ": named .gz but not gzip data"),
    "gzip with a flipped checksum": (
        "a.jsonl.gz", gzip.compress(lines(DONE))[:-8] + b"\0" * 8, ": damaged gzip data",
    ),
    "gzip with a tail": ("a.jsonl.gz", gzip.compress(lines(DONE)) + b"tail", ": damaged gzip data"),
    "a JSON object": ("a.json", json.dumps({"data": [DONE]}).encode(), ": expected a JSON list of records [{…}, …], got an"),
    "JSON Lines named .json": ("a.json", lines(DONE, DONE), ":2: not JSON: Extra data at column 1; one object a line? then"),
    "a broken JSON list": ("a.json", b'[{"prompt": "Q?"},\n {"prompt"]', ":2: not JSON: Expecting ':' delimiter at column"),
    "a key twice in a JSON list": ("a.json", b'[{"text": "a", "text": "b"}]', ": key 'text' appears twice"),
    "a JSON list that is not UTF-8": ("a.json", b'[{"text":\n"caf\xe9"}]', ":2: not UTF-8 (byte 0xe9 at column 5)"),
    "NUL bytes in CSV": ("a.csv", b"prompt,completion\nQ?,\0\n", ":2: NUL byte at column 4"),
    "a CSV header alone": ("a.csv", b"prompt,completion\n", ": empty file"),
    "a CSV without our columns": ("a.csv", b"question,answer\nQ?,A.\n", ":2: no known record shape in fields 'question'"),
    "a CSV column without name": ("a.csv", b"prompt,,completion\n", ":1: column 2 has no name in the header"),
    "a CSV column twice": ("a.csv", b"text,text\na,b\n", ":1: column 'text' appears twice in the header"),
    "a CSV quote never closed": ("a.csv", b'prompt,completion\nQ?,A.\nQ?,"A', ":3: not CSV from here on"),
    "parquet cut short": ("a.parquet", GOOD_PARQUET[:-30], ": not readable as Parquet"),
    "parquet of nothing": ("a.parquet", b"", ": empty file"),
    "no parquet at all": ("a.parquet", lines(DONE), ": not readable as Parquet"),
    "a parquet column of numbers": (
        "a.parquet", parquet({"prompt": ["Q?"], "completion": [4]}), ":1: completion: expected text, got number 4",
    ),
    "a null in parquet": (
        "a.parquet", parquet({"prompt": ["Q?", None], "completion": ["A.", "A."]}), ":2: prompt: expected text, got null",
    ),
    "an unsupported extension": ("a.txt", b"words", ": cannot read this kind of file; give one of .jsonl, .jsonl.gz"),
    "no extension": ("a", lines(DONE), ": cannot read this kind of file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name: str, tmp_path: Path) -> None:
    file_name, data, message = BAD_FILES[name]
    path = tmp_path / file_name
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_records(str(path))
    text = str(caught.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text
    assert caught.value.exit_code == EXIT_DATA


@pytest.mark.parametrize(
    "name", [name for name, (file, _, _) in BAD_FILES.items() if "gz" in file or "JSON" in name or name == "UTF-16"]
)
def test_a_bad_file_is_not_skipped(name: str, tmp_path: Path) -> None:
    file_name, data, message = BAD_FILES[name]
    path = tmp_path / file_name
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_records(str(path), on_error="skip")
    assert message in str(caught.value)


def test_gzip_cut_short_names_the_line_it_reached(tmp_path: Path) -> None:
    """Uncompressed blocks (level 0): cutting the 8-byte trailer loses no line, so the cut is after line 3, at 4."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(DONE, DONE, DONE), compresslevel=0)[:-8])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:4: the gzip data is cut short here"):
        load_records(str(path))


def test_ragged_csv_rows_are_named_by_their_first_line(tmp_path: Path) -> None:
    """Line 1 is the header, 2-3 one quoted row, 4 a row of three cells, 5 blank, 6 a row of one cell, 7 a good one."""
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines",A.\nQ?,A.,more\n\nQ?\nQ?,A.\n')
    with pytest.raises(DataError, match=r"a\.csv:4: 3 cells, and the header has 2 columns"):
        load_records(str(path))
    records = load_records(str(path), on_error="skip")
    assert [record.origin.line for record in records.records] == [2, 7]
    assert [(problem.origin.line, problem.kind) for problem in records.skipped] == [(4, "row"), (6, "row")]


def test_skipping_everything_raises_and_shows_the_first_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(b"{", DONE | {"completion": ""}))
    with pytest.raises(DataError, match=r"none of its 2 records can be used; the first: .*a\.jsonl:1: not JSON"):
        load_records(str(path), on_error="skip")


def test_the_shape_is_that_of_the_first_usable_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"foo": 1}, PAIR, DONE))
    records = load_records(str(path), on_error="skip")
    assert records.shape == "prompt+chosen+rejected"
    assert [problem.kind for problem in records.skipped] == ["shape", "mixed-shapes"]


def test_there_are_enough_cases() -> None:
    assert len(BAD_RECORDS) + len(BAD_FILES) >= 80


WHOLE = {
    "a.jsonl": lines(PAIR, PAIR, PAIR),
    "a.json": json.dumps([CHAT, CHAT]).encode(),
    "a.csv": b'prompt,completion\n"a, b",c\nd,"e\nf"\n',
    "a.jsonl.gz": gzip.compress(lines(HH, HH), mtime=0),
}


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(WHOLE)), data=st.data(), on_error=st.sampled_from(["raise", "skip"]))
def test_random_damage_never_ends_in_a_traceback(name: str, data: st.DataObject, on_error: str) -> None:
    """Bytes overwritten, cut off and put in: the file still loads, or the error is one line and names the file."""
    damaged = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        damage = data.draw(st.sampled_from(["set", "insert", "cut"]))
        byte = data.draw(st.sampled_from([0, 10, 13, 34, 44, 92, 123, 125, 128, 255]))
        if damage == "cut":
            del damaged[at:]
        else:
            damaged[at : at + (damage == "set")] = bytes([byte])
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(damaged)
        message = str(path)
        try:
            load_records(str(path), on_error=on_error)
        except DataError as error:
            message = str(error)
        assert message.startswith(str(path))
        assert "\n" not in message
