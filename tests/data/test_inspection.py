"""What `tunelab inspect` shows is what will be trained on."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.data.small_tokenizers import CHATML, byte_level, metaspace
from tests.data.test_rendering import DIALOGUE, HERE, TRANSCRIPT, record_set, run
from tunelab.data import Problem, inspection, prepare, render_inspection, render_sample
from tunelab.types import Origin, PromptCompletion

TOKENIZERS = {"byte-level": byte_level, "metaspace": metaspace}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
    | st.text(alphabet="\ufffd😀é字ab \n", min_size=1, max_size=12)
)
def test_spans_join_to_the_decoded_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    (example,) = run(PromptCompletion("Q: ", text, None, HERE), tokenizer).examples
    spans = render_sample(example, tokenizer)
    ids = [*example.prompt_ids.tolist(), *example.completions[0].ids.tolist()]
    assert "".join(words for words, _ in spans) == tokenizer.decode(ids)
    assert sum(loss for _, loss in spans) <= example.completions[0].loss_mask.sum()
    if "\ufffd" not in text:
        assert all("\ufffd" not in words for words, _ in spans)


def test_bytes_of_one_character_are_one_span() -> None:
    """😀 is four bytes, each a token of the small byte-level vocabulary, é two."""
    tokenizer = byte_level()
    (example,) = run(PromptCompletion("ZZ", "😀é", None, HERE), tokenizer).examples
    assert render_sample(example, tokenizer) == [
        ("Z", False), ("Z", False), ("😀", True), ("é", True), ("<|endoftext|>", True),
    ]  # fmt: skip


def test_a_character_cut_in_half_does_not_swallow_what_is_behind_it() -> None:
    """max_length 3 leaves two of the four bytes of 😀; the other side of the pair is whole."""
    tokenizer = byte_level()
    (example,) = prepare(
        record_set(PromptCompletion("Z", "😀", None, HERE)), tokenizer, method="sft", max_length=3
    ).examples
    assert render_sample(example, tokenizer) == [("Z", False), ("\ufffd", True)]


def test_replacement_characters_in_the_data_are_text_like_any_other() -> None:
    """Half a character decodes to U+FFFD as well; each of the five is three byte tokens, so a span of its own."""
    tokenizer = byte_level()
    (example,) = run(PromptCompletion("Z", "\ufffd" * 5 + "Z", None, HERE), tokenizer).examples
    spans = render_sample(example, tokenizer)
    assert [text for text, _ in spans] == ["Z", *["\ufffd"] * 5, "Z", "<|endoftext|>"]


def test_the_report_is_plain_data() -> None:
    tokenizer = byte_level()
    problem = Problem(Origin("a.jsonl", 9), "rejected: empty", "empty")
    dataset = prepare(replace(record_set(TRANSCRIPT), skipped=(problem,)), tokenizer, method="dpo")
    report = inspection(dataset, tokenizer)
    assert json.loads(json.dumps(report)) == report
    assert report["problems"] == [{"origin": "a.jsonl:9", "kind": "empty", "message": "rejected: empty"}]
    (sample,) = report["samples"]
    assert sample["origin"] == "a.jsonl:1"
    assert "".join(text for text, _ in sample["prompt"]) == TRANSCRIPT.prompt
    assert not any(loss for _, loss in sample["prompt"])
    chosen, rejected = sample["completions"]
    assert (chosen["name"], rejected["name"]) == ("chosen", "rejected")
    assert "".join(text for text, _ in rejected["text"]) == " Eaten.<|endoftext|>"
    assert all(loss for _, loss in chosen["text"])
    assert chosen["loss_tokens"] == chosen["tokens"]


def test_the_terminal_shows_counts_problems_and_text() -> None:
    tokenizer = byte_level(CHATML)
    problem = Problem(Origin("a[0].jsonl", 9), "messages[1].role: unknown role '[bold]'", "role")
    dataset = prepare(replace(record_set(DIALOGUE), skipped=(problem,)), tokenizer, method="sft")
    report = inspection(dataset, tokenizer)
    shown = io.StringIO()
    Console(file=shown, width=100, force_terminal=True, color_system="truecolor").print(render_inspection(report))
    plain = io.StringIO()
    Console(file=plain, width=100).print(render_inspection(report))
    assert "skipped a[0].jsonl:9: messages[1].role: unknown role '[bold]'" in plain.getvalue(), "no markup is read"
    assert "How are you?<|im_end|>" in plain.getvalue()
    assert "1 used of 2" in plain.getvalue()
    assert "\x1b[" in shown.getvalue()
    assert "\x1b[" not in plain.getvalue()


def test_reading_and_preparing_import_neither_torch_nor_rich_nor_pyarrow() -> None:
    code = (
        "import sys; from tunelab.data import load_records; load_records('builtin:helpful-mini');"
        "print([name for name in ('torch', 'transformers', 'rich', 'pyarrow', 'datasets') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
