"""Packed rows give every sequence back, and predict every token from the one before it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunelab.data import pack
from tunelab.types import Batch, Completion, Example, Origin, Segment

HERE = Origin("a", 1)


def example(prompt: list[int], *completions: list[int], masks: list[list[bool]] | None = None) -> Example:
    masks = masks or [[True] * len(c) for c in completions]
    parts = (Completion(np.asarray(c, np.int32), np.asarray(m, bool)) for c, m in zip(completions, masks, strict=True))
    return Example(np.asarray(prompt, np.int32), tuple(parts), HERE)


def test_one_sequence_and_one_pair_by_hand() -> None:
    """Row: 1 2 3 | 4 5 , 6 7 , 8. The 3 is predicted at row 1. The pair's prompt is at rows 3-4; row 4 predicts both 6
    and 8; row 5, which holds the 6, predicts the 7."""
    batch = pack([example([1, 2], [3]), example([4, 5], [6, 7], [8])], [10, 20])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 2]
    assert batch.segments == (Segment(0, 3), Segment(3, 5), Segment(5, 7, 3, 5), Segment(7, 8, 3, 5))
    assert batch.loss_positions.tolist() == [1, 4, 5, 4]
    assert batch.targets.tolist() == [3, 6, 7, 8]
    assert batch.sequence_ids.tolist() == [0, 1, 1, 2]
    assert (batch.num_sequences, batch.record_ids) == (3, (10, 20))
    for name in ("input_ids", "position_ids", "loss_positions", "targets", "sequence_ids"):
        assert getattr(batch, name).dtype == torch.int64


def test_without_prompt_the_first_token_is_no_target() -> None:
    batch = pack([example([], [3, 4, 5])], [0])
    assert batch.segments == (Segment(0, 3),)
    assert (batch.loss_positions.tolist(), batch.targets.tolist()) == ([0, 1], [4, 5])


def test_masked_tokens_are_no_targets() -> None:
    batch = pack([example([1], [2, 3, 4, 5], masks=[[True, False, False, True]])], [0])
    assert (batch.loss_positions.tolist(), batch.targets.tolist()) == ([0, 3], [2, 5])


tokens = st.lists(st.integers(0, 50_000), min_size=1, max_size=7)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    prompt = draw(st.lists(st.integers(0, 50_000), max_size=7))
    completions = draw(st.lists(tokens, min_size=1, max_size=3))
    masks = [draw(st.lists(st.booleans(), min_size=len(c), max_size=len(c))) for c in completions]
    return example(prompt, *completions, masks=masks)


def unpack(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(ids, positions) of each sequence: what a segment attends to, prefix first. A prompt alone is no sequence."""
    shared = {(s.prefix_start, s.prefix_stop) for s in batch.segments if s.prefix_length}
    found = []
    for segment in batch.segments:
        if (segment.start, segment.stop) in shared:
            continue
        rows = [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, segment.stop)]
        found.append((batch.input_ids[rows].tolist(), batch.position_ids[rows].tolist()))
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(examples(), min_size=1, max_size=5))
def test_unpacking_gives_back_each_sequence(records: list[Example]) -> None:
    batch = pack(records, range(len(records)))
    assert batch.num_tokens == sum(record.num_tokens for record in records)
    assert [s.start for s in batch.segments] == [0, *(s.stop for s in batch.segments[:-1])], "segments tile the row"
    assert batch.segments[-1].stop == batch.num_tokens

    sequences = [(record, c) for record in records for c in record.completions]
    assert batch.num_sequences == len(sequences)
    unpacked = unpack(batch)
    assert len(unpacked) == len(sequences)
    for number, ((record, c), (ids, positions)) in enumerate(zip(sequences, unpacked, strict=True)):
        assert ids == [*record.prompt_ids.tolist(), *c.ids.tolist()]
        assert positions == list(range(len(ids)))
        mine = batch.sequence_ids == number
        # Where a target stands in its own sequence: one behind the position of its predictor.
        places = [position + 1 for position in batch.position_ids[batch.loss_positions[mine]].tolist()]
        offset = len(record.prompt_ids)
        wanted = [offset + i for i in np.flatnonzero(c.loss_mask).tolist() if offset + i > 0]
        assert places == wanted
        assert batch.targets[mine].tolist() == [ids[place] for place in places]
        inputs = batch.input_ids[batch.loss_positions[mine]].tolist()
        assert inputs == [ids[place - 1] for place in places]
    assert batch.sequence_ids.tolist() == sorted(batch.sequence_ids.tolist())
