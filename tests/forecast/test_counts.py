"""Counts from columns against rows that are packed."""

from __future__ import annotations

import numpy as np
import pytest

from tunelab.cost import Row, attention_pairs, predictor_counts
from tunelab.data import pack
from tunelab.data.columns import Examples
from tunelab.forecast.counts import record_counts
from tunelab.types import Completion, Example, Origin


def example(prompt: int, *masks: list[bool]) -> Example:
    completions = tuple(Completion(np.arange(len(mask), dtype=np.int32), np.array(mask)) for mask in masks)
    return Example(np.arange(prompt, dtype=np.int32), completions, Origin("test", 1))


SINGLE = [
    example(3, [True, True]),
    example(0, [True, True, False, True]),
    example(2, [False, True, True]),
    example(1, [True]),
]
PAIRS = [example(3, [True, True], [True]), example(0, [True, True], [False, True]), example(2, [False, True], [True])]


@pytest.mark.parametrize("examples", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_counts_are_those_of_packed_rows(examples: list[Example]) -> None:
    columns = Examples.of(examples)
    found = record_counts(columns, np.arange(len(examples)))
    for number, one in enumerate(examples):
        batch = pack([one], [number])
        predictors, pairs = predictor_counts(batch)
        expected = [batch.num_tokens, predictors, len(batch.targets), attention_pairs(batch), pairs]
        assert found[:, number].tolist() == expected
    shuffled = np.array([2, 0])
    assert record_counts(columns, shuffled).tolist() == found[:, shuffled].tolist()


def test_a_row_by_hand() -> None:
    """A pair of 3 + 2 + 1 tokens and one of 2 + 2 + 1: four sequences, the longest of 5; in the first the last block
    computes the prompt's last position and the first of two, in the second the prompt's last and the first."""
    row = Row.of(pack([PAIRS[0], PAIRS[2]], [0, 1]))
    assert (row.tokens, row.loss_positions, row.sequences, row.longest, row.padded) == (11, 5, 4, 5, 20)
    assert row.kept == 4
