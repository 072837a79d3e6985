"""Rows in multiples of ALIGNMENT, for libraries that make a kernel for every shape.

oneDNN prepares each product's kernels for its exact shape and keeps them. The rows of a packed batch are other ones at
every step, in the blocks (T tokens), in the last block (Q queries) and in the head (S targets): some twenty new
kernels a step, each of a few milliseconds and up to half a megabyte, which oneDNN does not give back: a run of 60 steps
of a model of 0.2 M parameters grew by 600 MB. A filler segment behind the row, to which nothing attends and whose
result nobody reads, rounds T and Q up; the head leaves its last few positions to the other library (`logprobs.py`).
With shapes that repeat, kernels are found again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from tunelab.types import Batch, Segment, Tail

ALIGNMENT = 32


def aligned(batch: Batch) -> Batch:
    """`batch` with a filler segment of token 0 that makes its tokens, and the last block's queries, multiples of
    ALIGNMENT. Loss positions, targets and sequences are what they were; so is every number computed for them.
    """
    tokens, tail = batch.num_tokens, batch.tail
    filler, queries = -tokens % ALIGNMENT, -len(tail.kept) % ALIGNMENT
    if queries > filler:
        filler += ALIGNMENT
    if not filler:
        return batch
    longer = replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, filler)),
        position_ids=F.pad(batch.position_ids, (0, filler)),
        segments=(*batch.segments, Segment(tokens, tokens + filler)),
    )
    span = (tokens, tokens + queries) if queries else (0, 0)
    kept = torch.cat((tail.kept, torch.arange(*span, device=tail.kept.device)))
    longer.__dict__["tail"] = Tail((*tail.ranges, span), kept, tail.index)  # the cached property
    return longer
