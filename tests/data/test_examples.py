"""From records to counted, cut examples, and the prompts to generate from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.small_tokenizers import CHATML, byte_level, metaspace
from tests.data.test_rendering import ANSWER, ANSWER2, DIALOGUE, HERE, SYSTEM, TRANSCRIPT, USER, USER2, record_set, run
from tunelab.data import generation_prompts, load_records, prepare, render_prompt
from tunelab.data.cutting import cut_example
from tunelab.data.loader import fixed_sample
from tunelab.errors import EXIT_DATA, DataError
from tunelab.types import (
    Completion,
    Conversation,
    Message,
    Origin,
    PlainText,
    PreferencePair,
    PromptCompletion,
    Record,
    Turns,
)


def ids(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def completion(*values: int, loss: str = "") -> Completion:
    """`loss`: one 1 or 0 a token; all 1 if left out."""
    return Completion(ids(*values), np.asarray([c == "1" for c in loss or "1" * len(values)]))


# --- cutting ------------------------------------------------------------------------------------------------------


def test_the_prompt_is_cut_first_from_its_left() -> None:
    """5 + 3 tokens into 6: two off the prompt."""
    example = cut_example(ids(1, 2, 3, 4, 5), [completion(6, 7, 8)], 6, HERE)
    assert example is not None
    assert example.prompt_ids.tolist() == [3, 4, 5]
    assert example.prompt_cut == 2
    assert example.completions[0].ids.tolist() == [6, 7, 8]
    assert example.completions[0].cut == 0


def test_then_the_completion_from_its_right() -> None:
    """3 + 4 tokens into 3: the prompt keeps one, so two of the completion fit."""
    example = cut_example(ids(1, 2, 3), [completion(4, 5, 6, 7)], 3, HERE)
    assert example is not None
    assert example.prompt_ids.tolist() == [3]
    assert example.prompt_cut == 2
    assert example.completions[0].ids.tolist() == [4, 5]
    assert example.completions[0].cut == 2


def test_a_pair_cuts_its_prompt_once_by_the_longer_side() -> None:
    """4 + max(1, 3) tokens into 5: two off the prompt, for both; neither completion is cut."""
    example = cut_example(ids(1, 2, 3, 4), [completion(5), completion(6, 7, 8)], 5, HERE)
    assert example is not None
    assert example.prompt_ids.tolist() == [3, 4]
    assert [c.ids.tolist() for c in example.completions] == [[5], [6, 7, 8]]
    assert [c.cut for c in example.completions] == [0, 0]


def test_without_loss_left_the_record_is_dropped() -> None:
    """The loss lies on the third token; one prompt token and two completion tokens fit."""
    assert cut_example(ids(1), [completion(2, 3, 4, loss="001")], 3, HERE) is None
    assert cut_example(ids(1), [completion(2, 3), completion(2, 3, 4, loss="001")], 3, HERE) is None
    assert cut_example(ids(), [completion(2, loss="0")], 3, HERE) is None


@given(
    prompt=st.integers(0, 20),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    max_length=st.integers(2, 24),
)
def test_cutting_never_exceeds_and_counts_right(prompt: int, lengths: list[int], max_length: int) -> None:
    before = np.arange(prompt, dtype=np.int32)
    answers = [completion(*range(100, 100 + length)) for length in lengths]
    example = cut_example(before, answers, max_length, HERE)
    assert example is not None, "every completion token carries loss, and at least one fits"
    left = len(example.prompt_ids)
    assert left >= min(prompt, 1)
    assert left + example.prompt_cut == prompt
    assert example.prompt_ids.tolist() == before[example.prompt_cut :].tolist()
    for old, new in zip(answers, example.completions, strict=True):
        assert left + len(new.ids) <= max_length
        assert len(new.ids) + new.cut == len(old.ids) == len(new.loss_mask) + new.cut
        assert new.ids.tolist() == old.ids[: len(new.ids)].tolist()
        assert not new.cut or left <= 1, "an answer is cut only when nothing is left of the prompt to cut"
    if prompt + max(lengths) > max_length:
        assert left + max(len(c.ids) for c in example.completions) == max_length, "no more is cut than needed"
    else:
        assert (example.prompt_cut, [c.cut for c in example.completions]) == (0, [0] * len(lengths))


def test_a_cut_answer_has_no_eos() -> None:
    tokenizer = byte_level()
    record = PromptCompletion("Q", "a long answer that goes on", None, HERE)
    whole = run(record, tokenizer).examples[0].completions[0].ids.tolist()
    (example,) = prepare(record_set(record), tokenizer, method="sft", max_length=4).examples
    assert whole[-1] == tokenizer.eos_token_id
    assert example.completions[0].ids.tolist() == whole[:3]
    assert example.completions[0].cut == len(whole) - 3


# --- methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [DIALOGUE, PlainText("words", HERE), PromptCompletion("Q", "A", None, HERE)])
def test_dpo_needs_pairs(record: Record) -> None:
    with pytest.raises(
        DataError, match=r"^a\.jsonl: method dpo needs preference pairs .* are a shape; train"
    ) as caught:
        run(record, byte_level(CHATML), "dpo")
    assert caught.value.exit_code == EXIT_DATA


def test_sft_on_pairs_trains_on_the_chosen() -> None:
    tokenizer = byte_level()
    (pair,) = run(PreferencePair("Q?", "good", "bad", HERE), tokenizer).examples
    (single,) = run(PromptCompletion("Q?", "good", None, HERE), tokenizer).examples
    assert len(pair.completions) == 1
    assert pair.prompt_ids.tolist() == single.prompt_ids.tolist()
    assert pair.completions[0].ids.tolist() == single.completions[0].ids.tolist()


def test_sft_on_labels_trains_on_the_desirable() -> None:
    records = [PromptCompletion("Q?", "A", label, Origin("a.jsonl", n)) for n, label in ((1, True), (2, False))]
    dataset = prepare(record_set(*records), byte_level(), method="sft")
    assert [example.origin.line for example in dataset.examples] == [1]
    assert dataset.summary.excluded.origins == ("a.jsonl:2",)
    with pytest.raises(DataError, match="all 1 records are labelled false"):
        prepare(record_set(records[1]), byte_level(), method="sft")


def test_nothing_left_is_an_error() -> None:
    """No prompt and one token of text: nothing predicts it."""
    tokenizer = byte_level()
    record = PlainText("<|endoftext|>", HERE)
    with pytest.raises(DataError, match=r"a\.jsonl: nothing left to train on: 0 records skipped, 1 without an answer"):
        run(record, tokenizer)


# --- the summary --------------------------------------------------------------------------------------------------


def test_the_summary_adds_up() -> None:
    """Byte-level text outside the corpus is a token a byte: prompts of 2 and 6, answers of 1 and 3 bytes, with EOS.

    max_length 6: the second prompt is cut from 6 to 2 (3 + EOS = 4 stay). Totals: 2 + 2 and 2 + 4 = 10. Padded in one
    batch of two: 2 × 6 = 12, so 1 - 10/12 avoided. The third record is undesirable.
    """
    records = record_set(
        PromptCompletion("ZZ", "X", True, Origin("a.jsonl", 1)),
        PromptCompletion("ZZZZZZ", "XXX", True, Origin("a.jsonl", 2)),
        PromptCompletion("ZZ", "X", False, Origin("a.jsonl", 3)),
    )
    summary = prepare(records, byte_level(), method="sft", max_length=6).summary
    report = summary.to_json()
    assert json.loads(json.dumps(report)) == report
    assert report | {
        "records": 3, "used": 2, "total_tokens": 10, "loss_tokens": 6, "padded_tokens": 12, "padding_avoided": 0.1667,
        "excluded": {"count": 1, "origins": ["a.jsonl:3"]},
        "dropped": {"count": 0, "origins": []},
        "prompts_cut": {"count": 1, "origins": ["a.jsonl:2"]},
        "completions_cut": {"count": 0, "origins": []},
    } == report  # fmt: skip
    assert report["lengths"]["prompt"] == {"p5": 2.0, "p50": 2.0, "p95": 2.0, "mean": 2.0, "max": 2}
    assert report["lengths"]["completion"] == {"p5": 2.1, "p50": 3.0, "p95": 3.9, "mean": 3.0, "max": 4}
    assert set(report["lengths"]) == {"prompt", "completion", "total"}
    assert "2 of 3 records of a.jsonl" in summary.sentence()
    assert "1 prompts cut (first: a.jsonl:2)" in summary.sentence()


def test_pairs_count_their_prompt_once_packed_and_twice_padded() -> None:
    """Prompt 2, answers 1 + EOS and 3 + EOS: 2 + 2 + 4 = 8 packed; two rows of 2 + 4 = 12 padded."""
    summary = run(PreferencePair("ZZ", "X", "XXX", HERE), byte_level(), "dpo").summary
    assert (summary.total_tokens, summary.padded_tokens, summary.loss_tokens) == (8, 12, 6)
    assert list(summary.lengths) == ["prompt", "chosen", "rejected", "total"]


def test_lists_are_long_but_not_endless() -> None:
    records = [PromptCompletion("Q", "A", False, Origin("a", n)) for n in range(60)]
    listed = prepare(
        record_set(*records, PromptCompletion("Q", "A", True, HERE)), byte_level(), method="sft"
    ).summary.excluded
    assert (listed.count, len(listed.origins)) == (60, 50)


def test_the_fingerprint_sees_ids_masks_and_borders() -> None:
    tokenizer = byte_level(CHATML)
    variants = [
        run(PromptCompletion("ab", "c", None, HERE), tokenizer),
        run(PromptCompletion("a", "bc", None, HERE), tokenizer),
        run(PromptCompletion("ab", "d", None, HERE), tokenizer),
        run(DIALOGUE, tokenizer),
        run(DIALOGUE, tokenizer, loss_on="last_completion"),
        run(PreferencePair("ab", "c", "d", HERE), tokenizer, "dpo"),
        run(PreferencePair("ab", "d", "c", HERE), tokenizer, "dpo"),
    ]
    assert len({dataset.fingerprint for dataset in variants}) == len(variants)
    assert run(DIALOGUE, tokenizer).fingerprint == variants[3].fingerprint


@pytest.mark.parametrize(
    ("record", "template", "render", "mode", "session"),
    [
        (DIALOGUE, CHATML, "auto", "chat", "chat"),
        (DIALOGUE, None, "auto", "transcript", "transcript"),
        (TRANSCRIPT, CHATML, "auto", "text", "transcript"),
        (TRANSCRIPT, CHATML, "chat", "chat", "chat"),
        (PromptCompletion("Q", "A", None, HERE), CHATML, "auto", "text", "text"),
        (PlainText("words", HERE), CHATML, "chat", "text", "text"),
    ],
)
def test_the_mode_used_is_reported(record: Record, template: str, render: str, mode: str, session: str) -> None:
    summary = run(record, byte_level(template), render=render).summary
    assert (summary.render, summary.session_render) == (mode, session)


def test_the_real_hh_rlhf_tokenises_apart_as_whole(hh_rlhf: Path) -> None:
    """The design's rule for where a transcript's prompt ends, on 500 real pairs: no token straddles the border."""
    tokenizer = byte_level()
    records = load_records(str(hh_rlhf / "test.jsonl.gz"), on_error="skip", limit=500)
    dataset = prepare(records, tokenizer, method="dpo", max_length=100_000)
    for record, example in zip(records.records, dataset.examples, strict=True):
        assert isinstance(record, PreferencePair)
        for text, answer in zip((record.chosen, record.rejected), example.completions, strict=True):
            whole = tokenizer(f"{record.prompt}{text}")["input_ids"]
            assert [*example.prompt_ids.tolist(), *answer.ids.tolist()] == [*whole, tokenizer.eos_token_id]
            assert answer.ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


# --- prompts to generate from -------------------------------------------------------------------------------------


def test_generation_prompts_end_where_the_last_answer_begins() -> None:
    tokenizer = byte_level(CHATML)
    (prompt,) = generation_prompts(run(DIALOGUE, tokenizer), tokenizer, 1, seed=0)
    assert prompt.text == (
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nWell, thanks.<|im_end|>\n"
        "<|im_start|>user\nAnd the egg?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(prompt.ids) == tokenizer(prompt.text)["input_ids"]
    assert prompt.reference == "Cooled."


def test_generation_prompts_of_pairs_and_of_text() -> None:
    tokenizer = byte_level()
    (pair,) = generation_prompts(run(TRANSCRIPT, tokenizer, "dpo"), tokenizer, 5, seed=0)
    assert (pair.text, pair.reference) == (TRANSCRIPT.prompt, " Cooled.")
    (text,) = generation_prompts(run(PlainText("ZZZXX", HERE), tokenizer), tokenizer, 1, seed=0)
    assert (text.text, text.reference) == ("ZZZ", "XX"), "half of five tokens and EOS"


def test_generation_prompts_are_fixed_records() -> None:
    tokenizer = byte_level()
    records = [PromptCompletion(f"{n:03}", "A", None, HERE) for n in range(50)]
    dataset = prepare(record_set(*records), tokenizer, method="sft")
    texts = [prompt.text for prompt in generation_prompts(dataset, tokenizer, 4, seed=3)]
    assert texts == [f"{n:03}" for n in fixed_sample(50, 4, 3)]
    assert len(generation_prompts(dataset, tokenizer, 100, seed=3)) == 50
    assert generation_prompts(dataset, tokenizer, 0, seed=3) == []


@pytest.mark.parametrize(
    ("prompt", "template", "render", "text"),
    [
        ((USER,), CHATML, "auto", "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"),
        ("How are you?", CHATML, "chat", "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"),
        ((SYSTEM, USER, ANSWER, USER2), None, "auto",
         "Be brief.\n\nHuman: How are you?\n\nAssistant: Well, thanks.\n\nHuman: And the egg?\n\nAssistant:"),
        ("How are you?", None, "transcript", "\n\nHuman: How are you?\n\nAssistant:"),
        (TRANSCRIPT.prompt, None, "transcript", TRANSCRIPT.prompt),
        ("2+2=", CHATML, "auto", "2+2="),
    ],
)  # fmt: skip
def test_render_prompt(prompt: Turns | str, template: str | None, render: str, text: str) -> None:
    tokenizer = byte_level(template)
    assert list(render_prompt(prompt, tokenizer, render)) == tokenizer(text)["input_ids"]  # type: ignore[arg-type]


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_session_asks_as_the_training_did(template: str | None) -> None:
    tokenizer = byte_level(template)
    dataset = run(Conversation((USER, ANSWER, USER2, ANSWER2), HERE), tokenizer)
    (trained,) = generation_prompts(dataset, tokenizer, 1, seed=0)
    assert render_prompt((USER, ANSWER, USER2), tokenizer, "auto") == trained.ids


def test_render_prompt_puts_bos_once_and_reports_refusals() -> None:
    tokenizer = metaspace()
    assert list(render_prompt("The egg", tokenizer, "text")) == tokenizer("The egg")["input_ids"]
    with pytest.raises(DataError, match="system message at its beginning only"):
        render_prompt((USER, Message("system", "x")), byte_level(), "transcript")
