"""Orders, mixes and the file both sides read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from benchmarks.jobs import Job, TokenExample, read_examples, write_examples
from benchmarks.workloads import EQUAL_LENGTH, _equal, _ordered


def example(number: int, length: int) -> TokenExample:
    return TokenExample([number] * (length - 1), [[number]])


POOL = [example(number, 2 + (number * 37) % 101) for number in range(400)]


def test_a_file_of_examples_returns_what_was_written(tmp_path: Path) -> None:
    examples = [TokenExample([1, 2], [[3], [4, 5]]), TokenExample([6], [])]
    write_examples(tmp_path / "examples.jsonl", examples)
    assert read_examples(tmp_path / "examples.jsonl") == examples


def test_real_tokens_count_the_prompt_once() -> None:
    assert TokenExample([1, 2, 3], [[4], [5, 6]]).real_tokens == 6


def test_equal_jobs_have_equal_keys_and_others_do_not(tmp_path: Path) -> None:
    job = Job("dpo", "trl", "m", "e", 8, 10, 2, options={"beta": 1})
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json").key == job.key
    assert Job("dpo", "trl", "m", "e", 8, 10, 2).key != job.key


def test_an_order_is_fixed_and_takes_each_example_once() -> None:
    for order in ("sequential", "grouped"):
        chosen = _ordered(POOL, order, steps=6, batch_size=8)
        assert chosen == _ordered(POOL, order, steps=6, batch_size=8)
        assert max(Counter(e.completions[0][0] for e in chosen).values()) == 1
        assert len(chosen) == 48


def test_grouping_makes_batches_of_like_length_without_favouring_long_ones() -> None:
    """Padding of a random order is about half the longest; grouped it is small. Mean lengths stay alike (52 ± 10)."""

    def lengths(examples: list[TokenExample]) -> list[int]:
        return [e.real_tokens for e in examples]

    def padded_share(found: list[int]) -> float:
        padded = sum(8 * max(found[start : start + 8]) for start in range(0, len(found), 8))
        return 1 - sum(found) / padded

    grouped = lengths(_ordered(POOL, "grouped", steps=20, batch_size=8))
    random_order = lengths(_ordered(POOL, "sequential", steps=20, batch_size=8))
    assert padded_share(random_order) > 0.3
    assert padded_share(grouped) < 0.1
    assert abs(sum(grouped) / len(grouped) - 52) < 10


def test_the_control_has_nothing_to_pad() -> None:
    for completions in (1, 2):
        examples = _equal(POOL, completions)
        assert examples
        assert {len(e.prompt) for e in examples} == {1}
        assert {1 + len(ids) for e in examples for ids in e.completions} == {EQUAL_LENGTH}
        assert {len(e.completions) for e in examples} == {completions}
    stream = [token for e in POOL for token in (*e.prompt, *e.completions[0])]
    first = _equal(POOL, 1)
    assert [*first[0].completions[0], *first[1].completions[0]] == stream[: 2 * (EQUAL_LENGTH - 1)]
