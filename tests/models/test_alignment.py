"""Rows in multiples of 32: whole, and nothing that is read changes."""

from __future__ import annotations

import pytest
import torch

from tests.models.small_models import small_gpt2, small_llama
from tunelab.models.alignment import ALIGNMENT, aligned
from tunelab.models.packed import enable_packing, packed_logprobs
from tunelab.types import Batch, Segment


def row(prompt: int, first: int, second: int) -> Batch:
    """A pair behind a shared prompt; the loss is on the last token of both and on all of the first."""
    total = prompt + first + second
    segments = (Segment(0, prompt), Segment(prompt, prompt + first, 0, prompt))
    segments += (Segment(prompt + first, total, 0, prompt),)
    positions = torch.cat([torch.arange(prompt), *(torch.arange(prompt, prompt + n) for n in (first, second))])
    predictors = torch.tensor([*range(prompt, prompt + first - 1), total - 2])
    ids = torch.arange(total) % 97 + 1
    owners = torch.tensor([0] * (first - 1) + [1])
    return Batch(ids, positions, segments, predictors, ids[predictors + 1], owners, 2, (0,))


@pytest.mark.parametrize("lengths", [(3, 5, 4), (20, 8, 4), (9, 30, 6), (40, 17, 8), (2, 2, 2)])
def test_tokens_and_queries_are_whole_multiples(lengths: tuple[int, int, int]) -> None:
    batch = row(*lengths)
    longer = aligned(batch)
    assert longer.num_tokens % ALIGNMENT == 0
    assert longer.num_tokens - batch.num_tokens < 2 * ALIGNMENT
    assert len(longer.tail.kept) % ALIGNMENT == 0
    assert torch.equal(longer.tail.kept[longer.tail.index], batch.loss_positions)
    assert torch.equal(longer.input_ids[: batch.num_tokens], batch.input_ids)
    covered = [position for start, stop in longer.tail.ranges for position in range(start, stop)]
    assert covered == longer.tail.kept.tolist()
    edges = [edge for segment in longer.segments for edge in (segment.start, segment.stop)]
    assert edges[0] == 0
    assert edges[-1] == longer.num_tokens
    assert edges[1:-1:2] == edges[2::2], "segments tile the row"
    assert max(s.stop - s.start for s in longer.segments) <= max(s.stop - s.start for s in batch.segments)


def test_whole_rows_stay_as_they_are() -> None:
    batch = aligned(row(3, 5, 4))
    assert aligned(batch) is batch


@pytest.mark.parametrize("build", [small_gpt2, small_llama])
def test_gradients_are_those_of_the_bare_row(build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(), row(7, 9, 5)
    assert enable_packing(model) is None
    found = {}
    for name, function in (("bare", lambda bare: bare), ("aligned", aligned)):
        monkeypatch.setattr("tunelab.models.packed.aligned", function)
        model.zero_grad()
        logprobs = packed_logprobs(model, batch)
        logprobs.sum().backward()
        found[name] = [logprobs.detach(), *(p.grad.clone() for p in model.parameters())]
    for bare, filled in zip(found["bare"], found["aligned"], strict=True):
        torch.testing.assert_close(filled, bare, rtol=1e-5, atol=1e-5)
