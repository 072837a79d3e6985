"""Virtual tokens in packed rows: V of them before every sequence, made by an adapter instead of embedded.

They come in two forms. Embeddings (prompt tuning, P-tuning) take V rows of the packed row before each root segment (one
without a prefix), and go through every block like tokens. Keys and values (prefix tuning, P-tuning v2) are put before
those of each root segment in every layer's attention, and are rows of nothing else. In both a shared prompt has them
once; its completions see them through their prefix, which begins V rows earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunelab.models.segments import Part, plan_parts
from tunelab.types import Batch, Segment, Tail


@dataclass(frozen=True)
class VirtualTokens:
    """What an adapter puts before every sequence: one of the two, differentiable in the adapter's parameters.

    embeddings: (V, D), for positions 0 to V-1. keys_values: (L, 2, V, H_kv, K), keys as they are after rotation. The
    sequence's own tokens begin at position V either way.
    """

    embeddings: Tensor | None = None
    keys_values: Tensor | None = None

    @property
    def count(self) -> int:
        if self.embeddings is not None:
            return self.embeddings.shape[0]
        assert self.keys_values is not None
        return self.keys_values.shape[2]


@dataclass(frozen=True)
class Expansion:
    """A packed row of T tokens with V virtual rows put before each of its R root segments: T + R·V rows.

    segments: those of the longer row; roots include their virtual rows, and so do prefixes. tokens: of each segment,
    where its own tokens lie in the longer row. rows: (T,) the same for every token. virtual: (R·V,) the rows between.
    """

    segments: tuple[Segment, ...]
    tokens: tuple[tuple[int, int], ...]
    rows: Tensor
    virtual: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.rows) + len(self.virtual)

    def moved(self, ranges: Sequence[tuple[int, int]], segments: Sequence[Segment]) -> tuple[tuple[int, int], ...]:
        """Ranges within each of the row's `segments`, in the longer row; an empty range stays (0, 0)."""
        shifts = [start - segment.start for (start, _), segment in zip(self.tokens, segments, strict=True)]
        return tuple(
            (start + shift, stop + shift) if stop > start else (0, 0)
            for (start, stop), shift in zip(ranges, shifts, strict=True)
        )


@lru_cache(maxsize=8)
def expand(segments: tuple[Segment, ...], count: int, device: torch.device) -> Expansion:
    """Where everything goes. Made once a row, shared by its blocks. Roots come before what has them as prefix."""
    roots = [segment.prefix_length == 0 for segment in segments]
    shifts = [count * number for number in accumulate(roots)]
    starts = {segment.start: segment.start + shift for segment, shift in zip(segments, shifts, strict=True)}
    longer, tokens = [], []
    for segment, shift, root in zip(segments, shifts, roots, strict=True):
        start, stop = segment.start + shift, segment.stop + shift
        tokens.append((start, stop))
        if root:
            longer.append(Segment(start - count, stop))
        else:
            first = starts[segment.prefix_start]
            longer.append(Segment(start, stop, first - count, first + segment.prefix_length))
    rows = [row for start, stop in tokens for row in range(start, stop)]
    virtual = [
        row
        for segment, root in zip(longer, roots, strict=True)
        if root
        for row in range(segment.start, segment.start + count)
    ]
    index, between = (torch.tensor(found).to(device, non_blocking=True) for found in (rows, virtual))
    return Expansion(tuple(longer), tuple(tokens), index, between)


def insert_virtual(batch: Batch, count: int) -> tuple[Batch, Expansion]:
    """The row with `count` more rows before every root segment, and where they are. Token 0 holds their places."""
    expansion = expand(batch.segments, count, batch.input_ids.device)
    rows, virtual = expansion.rows, expansion.virtual
    ids = torch.zeros(expansion.num_rows, dtype=torch.long, device=rows.device)
    positions = torch.arange(count, device=rows.device).repeat(len(virtual) // count)
    positions = torch.empty_like(ids).index_copy_(0, virtual, positions)
    longer = replace(
        batch,
        input_ids=ids.index_copy_(0, rows, batch.input_ids),
        position_ids=positions.index_copy_(0, rows, batch.position_ids + count),
        segments=expansion.segments,
        loss_positions=rows[batch.loss_positions],
    )
    tail = batch.tail
    ranges = expansion.moved(tail.ranges, batch.segments)
    longer.__dict__["tail"] = Tail(ranges, rows[tail.kept], tail.index)  # the cached property
    return longer, expansion


def shifted(batch: Batch, count: int) -> Batch:
    """The same row with its tokens `count` positions further on."""
    moved = replace(batch, position_ids=batch.position_ids + count)
    moved.__dict__["tail"] = batch.tail
    return moved


def put_embeddings(tokens: Tensor, embeddings: Tensor, expansion: Expansion) -> Tensor:
    """(T + R·V, D) token embeddings with the (V, D) virtual ones in their places."""
    repeats = len(expansion.virtual) // len(embeddings)
    return tokens.index_copy(0, expansion.virtual, embeddings.to(tokens.dtype).repeat(repeats, 1))


@dataclass(frozen=True)
class VirtualKeys:
    """Keys and values put before those of every root segment, layer by layer: (L, V, 2·H_kv·K), keys | values."""

    layers: tuple[Tensor, ...]
    expansion: Expansion

    @classmethod
    def of(cls, keys_values: Tensor, batch: Batch) -> VirtualKeys:
        rows = keys_values.permute(0, 2, 1, 3, 4).flatten(2)
        return cls(rows.unbind(), expand(batch.segments, keys_values.shape[2], batch.input_ids.device))

    def before(self, packed: Tensor, layer: int) -> Tensor:
        """Queries | keys | values of the longer row, from those of the T tokens: (T, W) → (T + R·V, W). The virtual
        rows' queries are zeros, which no part of the row asks for.
        """
        rows = self.layers[layer].to(packed.dtype)
        wide = F.pad(rows, (packed.shape[1] - rows.shape[1], 0))
        found: Tensor = _Interleave.apply(packed, wide, self.expansion)
        return found


@dataclass(frozen=True)
class RowInput:
    """A packed row as blocks get it. edit: what is done to its (T, D) token embeddings, if anything, before positions
    are added. keys: what is put before the keys and values of every layer.
    """

    batch: Batch
    edit: Callable[[Tensor], Tensor] | None = None
    keys: VirtualKeys | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Queries everywhere."""
        if self.keys is None:
            return plan_parts(self.batch.segments)
        return plan_parts(self.keys.expansion.segments, self.keys.expansion.tokens)

    @property
    def tail_parts(self) -> tuple[Part, ...]:
        """Queries where the last block needs them (`Batch.tail`)."""
        ranges = self.batch.tail.ranges
        if self.keys is None:
            return plan_parts(self.batch.segments, ranges)
        return plan_parts(self.keys.expansion.segments, self.keys.expansion.moved(ranges, self.batch.segments))


def prepare_row(batch: Batch, virtual: VirtualTokens | None = None, noise: Tensor | None = None) -> RowInput:
    """`batch` with virtual tokens before its sequences and (T, D) noise on its own tokens' embeddings."""
    if virtual is None or virtual.embeddings is None:
        edit = None if noise is None else lambda tokens: tokens + noise.to(tokens.dtype)
        if virtual is None:
            return RowInput(batch, edit)
        assert virtual.keys_values is not None
        return RowInput(shifted(batch, virtual.count), edit, VirtualKeys.of(virtual.keys_values, batch))
    longer, expansion = insert_virtual(batch, virtual.count)

    def put(tokens: Tensor, embeddings: Tensor = virtual.embeddings) -> Tensor:
        if noise is not None:
            tokens = tokens.index_add(0, expansion.rows, noise.to(tokens.dtype))
        return put_embeddings(tokens, embeddings, expansion)

    return RowInput(longer, put)


class _Interleave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, virtual: Tensor, expansion: Expansion) -> Tensor:
        ctx.expansion, ctx.count = expansion, len(virtual)
        out = tokens.new_empty(expansion.num_rows, tokens.shape[1])
        out.index_copy_(0, expansion.rows, tokens)
        return out.index_copy_(0, expansion.virtual, virtual.repeat(len(expansion.virtual) // len(virtual), 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        of_tokens = grad.index_select(0, ctx.expansion.rows) if ctx.needs_input_grad[0] else None
        of_virtual = None
        if ctx.needs_input_grad[1]:
            of_virtual = grad.index_select(0, ctx.expansion.virtual).unflatten(0, (-1, ctx.count)).sum(0)
        return of_tokens, of_virtual, None
