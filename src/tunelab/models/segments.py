"""Attention over the segments of a packed row: the arithmetic, for any device.

Each segment attends causally to itself and fully to its prefix (the shared prompt of a pair), never across sequences.
Queries may be a part of each segment (the last block needs those of loss positions only); the last query of a part sees
all keys up to itself, so a part attends *bottom-right* causally to [prefix; segment up to the part's end].

On CUDA in half precision one variable-length flash kernel does all segments at once; everywhere else they go one by one
through batched matrix products, which on a CPU beat the flash kernel for sequences of a few hundred tokens, need no
mask tensor for a prefix, and write gradients in place instead of into a zero-filled copy for each slice.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunelab.types import Segment

VARLEN_DTYPES = (torch.bfloat16, torch.float16)

BLOCK_QUERIES = {"cpu": 64, "cuda": 1024, "mps": 1024}
"""Queries in one matrix product. Smaller blocks skip more of the keys above the diagonal and make more calls: on a CPU
64 took three quarters of the time of whole sequences of 100 to 500 tokens; other devices pay more for a call."""


@dataclass(frozen=True)
class Part:
    """Queries [start, stop) of a row, at [out_start, out_stop) of the compact queries, and the keys they see."""

    start: int
    stop: int
    out_start: int
    first_key: int
    prefix_start: int
    prefix_stop: int

    @property
    def num_queries(self) -> int:
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        return self.stop - self.first_key + self.prefix_stop - self.prefix_start

    @property
    def out_stop(self) -> int:
        return self.out_start + self.num_queries


@lru_cache(maxsize=64)
def split_parts(parts: tuple[Part, ...], block: int) -> tuple[tuple[Part, bool], ...]:
    """Each part in blocks of at most `block` queries of like size, the last block first, and whether it is that one:
    it sees every key of its part.
    """
    blocks = []
    for part in parts:
        count = -(-part.num_queries // block)
        edges = [part.num_queries * i // count for i in range(count + 1)]
        for low, high in reversed(list(pairwise(edges))):
            piece = replace(part, start=part.start + low, stop=part.start + high, out_start=part.out_start + low)
            blocks.append((piece, high == part.num_queries))
    return tuple(blocks)


@lru_cache(maxsize=64)
def plan_parts(segments: tuple[Segment, ...], ranges: tuple[tuple[int, int], ...] | None = None) -> tuple[Part, ...]:
    """The parts of a row; `ranges` gives each segment's queries, by default all of it. Empty parts are left out."""
    parts, row = [], 0
    for i, segment in enumerate(segments):
        start, stop = (segment.start, segment.stop) if ranges is None else ranges[i]
        if stop > start:
            parts.append(Part(start, stop, row, segment.start, segment.prefix_start, segment.prefix_stop))
            row += stop - start
    return tuple(parts)


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, parts: tuple[Part, ...], scaling: float, dropout: float = 0.0
) -> Tensor:
    """Attention of one packed row.

    query: (T, H, K); key, value: (T, H_kv, K), H a multiple of H_kv; strided views are welcome. dropout: probability
    with which an attention weight is dropped. Returns (Q, H·K): the outputs of the parts' queries, part after part.
    """
    if dropout:
        return _attention_with_dropout(query, key, value, parts, scaling, dropout)
    if query.is_cuda and query.dtype in VARLEN_DTYPES:
        return _varlen_attention(query, key, value, parts, scaling)
    packed = torch.cat((query, key, value), dim=1)
    found: Tensor = _SegmentAttention.apply(packed, parts, query.shape[1], scaling)
    return found


def packed_segment_attention(
    packed: Tensor, num_heads: int, num_kv_heads: int, parts: tuple[Part, ...], scaling: float
) -> Tensor:
    """The same, from queries | keys | values side by side: (T, (H + 2·H_kv)·K) → (Q, H·K)."""
    if packed.is_cuda and packed.dtype in VARLEN_DTYPES:
        heads = packed.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
        query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        return _varlen_attention(query, key, value, parts, scaling)
    width = packed.shape[1] // (num_heads + 2 * num_kv_heads)
    found: Tensor = _SegmentAttention.apply(packed.unflatten(1, (-1, width)), parts, num_heads, scaling)
    return found


def _attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, parts: tuple[Part, ...], scaling: float, dropout: float
) -> Tensor:
    """Through autograd's own operations, which remember what was dropped."""
    num_kv = key.shape[1]
    outputs = []
    for part in parts:
        queries, keys, values = _grouped(query[part.start : part.stop], num_kv), _keys(key, part), _keys(value, part)
        probabilities = F.dropout(_probabilities(queries, keys, part, scaling), dropout)
        outputs.append(_by_query(torch.bmm(probabilities, values), part).permute(2, 0, 1, 3).flatten(1))
    return torch.cat(outputs)


class _SegmentAttention(torch.autograd.Function):
    """Of queries | keys | values (T, H + 2·H_kv, K). Keeps its input alone: probabilities are computed again."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, parts: tuple[Part, ...], num_heads: int, scaling: float) -> Tensor:
        num_kv = (packed.shape[1] - num_heads) // 2
        query, key, value = packed.split((num_heads, num_kv, num_kv), dim=1)
        out = packed.new_empty(parts[-1].out_stop if parts else 0, num_heads, packed.shape[2])
        for part, _ in split_parts(parts, BLOCK_QUERIES[packed.device.type]):
            queries = _grouped(query[part.start : part.stop], num_kv)
            probabilities = _probabilities(queries, _keys(key, part), part, scaling)
            attended = torch.bmm(probabilities, _keys(value, part))
            _ungrouped(out[part.out_start : part.out_stop], num_kv).copy_(_by_query(attended, part))
        ctx.save_for_backward(packed)
        ctx.parts, ctx.num_heads, ctx.scaling = parts, num_heads, scaling
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (packed,) = ctx.saved_tensors
        num_heads, scaling = ctx.num_heads, ctx.scaling
        num_kv = (packed.shape[1] - num_heads) // 2
        shape = (num_heads, num_kv, num_kv)
        query, key, value = packed.split(shape, dim=1)
        grad = grads[0].unflatten(1, (num_heads, -1))
        complete = sum(part.num_queries for part in ctx.parts) == len(packed)
        found = torch.empty_like(packed) if complete else torch.zeros_like(packed)
        grad_query, grad_key, grad_value = found.split(shape, dim=1)
        for part, sees_all in split_parts(ctx.parts, BLOCK_QUERIES[packed.device.type]):
            queries, keys, values = (
                _grouped(query[part.start : part.stop], num_kv),
                _keys(key, part),
                _keys(value, part),
            )
            probabilities = _probabilities(queries, keys, part, scaling)
            upstream = _grouped(grad[part.out_start : part.out_stop], num_kv)
            part_value = torch.bmm(probabilities.transpose(1, 2), upstream)
            # ∂S = P ∘ (∂P − rowsum(P ∘ ∂P)), ∂P = ∂O·Vᵀ: Dao et al. 2022, "FlashAttention", appendix B.2.
            scores = torch.bmm(upstream, values.transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(scores, probabilities, -1, scores.dtype)
            part_query = torch.bmm(scores, keys).mul_(scaling)
            part_key = torch.bmm(scores.transpose(1, 2), queries).mul_(scaling)
            _ungrouped(grad_query[part.start : part.stop], num_kv).copy_(_by_query(part_query, part))
            _add_keys(grad_key, part_key, part, write=complete and sees_all)
            _add_keys(grad_value, part_value, part, write=complete and sees_all)
        return found, None, None, None


def _keys(tensor: Tensor, part: Part) -> Tensor:
    """(H_kv, M, K): of the prefix, if any, and of the segment up to the last query."""
    own = tensor[part.first_key : part.stop]
    if part.prefix_stop:
        own = torch.cat((tensor[part.prefix_start : part.prefix_stop], own))
    return own.transpose(0, 1)


def _grouped(rows: Tensor, num_kv: int) -> Tensor:
    """(N, H, K) → (H_kv, G·N, K): the queries of all heads that share a key head, one after another."""
    return rows.unflatten(1, (num_kv, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _ungrouped(rows: Tensor, num_kv: int) -> Tensor:
    """(N, H, K) as (H_kv, G, N, K), a view."""
    return rows.unflatten(1, (num_kv, -1)).permute(1, 2, 0, 3)


def _by_query(grouped: Tensor, part: Part) -> Tensor:
    """(H_kv, G·N, K) as (H_kv, G, N, K)."""
    return grouped.unflatten(1, (-1, part.num_queries))


def _probabilities(queries: Tensor, keys: Tensor, part: Part, scaling: float) -> Tensor:
    """softmax(s·Q·Kᵀ) under the bottom-right causal mask: (H_kv, G·N, M)."""
    nothing = queries.new_empty(()).expand(queries.shape[0], queries.shape[1], keys.shape[1])
    scores = torch.baddbmm(nothing, queries, keys.transpose(1, 2), beta=0, alpha=scaling)
    if part.num_queries > 1:
        # Only the last N columns hold keys that some query must not see.
        corner = scores.unflatten(1, (-1, part.num_queries))[..., -part.num_queries :]
        corner.masked_fill_(_above_diagonal(part.num_queries, scores.device), float("-inf"))
    return torch.softmax(scores, dim=-1) if scores.requires_grad else torch.softmax(scores, dim=-1, out=scores)


@lru_cache(maxsize=256)
def _above_diagonal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def _add_keys(target: Tensor, grad: Tensor, part: Part, write: bool) -> None:
    """Add (H_kv, M, K) to the rows of the prefix and of the segment. write: the segment's rows hold nothing yet. In a
    row with queries everywhere that is so for the block that sees them all, which comes first; other blocks, and
    segments that have this one as their prefix, follow.
    """
    rows = grad.transpose(0, 1)
    prefix = part.prefix_stop - part.prefix_start
    if prefix:
        target[part.prefix_start : part.prefix_stop].add_(rows[:prefix])
    own = target[part.first_key : part.stop]
    if write:
        own.copy_(rows[prefix:])
    else:
        own.add_(rows[prefix:])


# --- variable-length kernels ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VarlenPlan:
    """Index tensors of one row on one device. query_index: (Q,) or None where all rows are queries in order;
    key_index: (sum of M,) rows of keys, prefixes repeated, or None; cu_*: (parts + 1,) int32 offsets.
    """

    query_index: Tensor | None
    key_index: Tensor | None
    cu_queries: Tensor
    cu_keys: Tensor
    longest_query: int
    longest_key: int


@lru_cache(maxsize=8)
def plan_varlen(parts: tuple[Part, ...], device: torch.device) -> VarlenPlan:
    """Made once a row, shared by its blocks."""
    queries = [position for part in parts for position in range(part.start, part.stop)]
    keys = [
        position
        for part in parts
        for span in ((part.prefix_start, part.prefix_stop), (part.first_key, part.stop))
        for position in range(*span)
    ]
    identity = list(range(len(queries)))

    def index(positions: list[int]) -> Tensor | None:
        return None if positions == identity else torch.tensor(positions).to(device, non_blocking=True)

    def offsets(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device, non_blocking=True)

    query_lengths, key_lengths = [p.num_queries for p in parts], [p.num_keys for p in parts]
    return VarlenPlan(
        index(queries), index(keys), offsets(query_lengths), offsets(key_lengths), max(query_lengths), max(key_lengths)
    )


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, parts: tuple[Part, ...], scaling: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # here: CUDA only

    plan = plan_varlen(parts, query.device)
    if plan.query_index is not None:
        query = query.index_select(0, plan.query_index)
    if plan.key_index is not None:
        key, value = key.index_select(0, plan.key_index), value.index_select(0, plan.key_index)
    grouped = query.shape[1] != key.shape[1]
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.12
    if grouped and not knows_groups:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    options: dict[str, Any] = {"enable_gqa": grouped} if knows_groups else {}
    # window (-1, 0): causal, aligned bottom-right where queries are fewer than keys (flash-attention ≥ 2.1).
    attended = varlen_attn(
        query,
        key,
        value,
        plan.cu_queries,
        plan.cu_keys,
        plan.longest_query,
        plan.longest_key,
        scale=scaling,
        window_size=(-1, 0),
        **options,
    )
    assert isinstance(attended, Tensor)
    return attended.flatten(1)
