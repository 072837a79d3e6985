"""Rows in multiples of ALIGNMENT, for libraries that make a kernel for every shape.

oneDNN prepares each product's kernels for its exact shape and keeps them. The rows of a packed batch are other ones at
every step, in the blocks (T tokens), in the last block (Q queries) and in the head (S targets): some twenty new
kernels a step, each of a few milliseconds and up to half a megabyte, which oneDNN does not give back: a run of 60 steps
of a model of 0.2 M parameters grew by 600 MB. Filler segments behind the row, to which nothing attends and whose
results nobody reads, round T and Q up; the head leaves its last few positions to the other library (`logprobs.py`).
With shapes that repeat, kernels are found again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from tunelab.types import Batch, Segment, Tail

ALIGNMENT = 32


def aligned(batch: Batch) -> Batch:
    """`batch` with filler segments of token 0 that make its tokens, and the last block's queries, multiples of
    ALIGNMENT. Loss positions, targets and sequences are what they were; so is every number computed for them.
    """
    tokens, tail = batch.num_tokens, batch.tail
    filler, queries = -tokens % ALIGNMENT, -len(tail.kept) % ALIGNMENT
    if queries > filler:
        filler += ALIGNMENT
    if not filler:
        return batch
    fillers = _fillers(batch, filler)
    longer = replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, filler)),
        position_ids=F.pad(batch.position_ids, (0, filler)),
        segments=(*batch.segments, *fillers),
    )
    ends = [min(segment.stop, tokens + queries) for segment in fillers]
    spans = [(s.start, stop) if stop > s.start else (0, 0) for s, stop in zip(fillers, ends, strict=True)]
    kept = torch.cat((tail.kept, torch.arange(tokens, tokens + queries, device=tail.kept.device)))
    longer.__dict__["tail"] = Tail((*tail.ranges, *spans), kept, tail.index)  # the cached property
    return longer


def _fillers(batch: Batch, count: int) -> list[Segment]:
    """`count` tokens behind the row, in segments no longer than its own: a sliding window may be hardly wider."""
    start, stop = batch.num_tokens, batch.num_tokens + count
    longest = max(segment.stop - segment.start for segment in batch.segments)
    return [Segment(at, min(at + longest, stop)) for at in range(start, stop, longest)]
