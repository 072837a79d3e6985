"""Attention over packed rows, registered through transformers' public `AttentionInterface`.

A packed row holds many sequences end to end; each `Segment` attends causally to itself and fully to its prefix (the
shared prompt of a pair), and never across sequences. The arithmetic is in `segments.py`: no T×T mask is ever built.

transformers hands keyword arguments of the model's forward to the attention function, so the segments travel with the
call: no global state. A model whose attention ignores the interface is found out by `packed.probe_layout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from tunelab.models.segments import plan_parts, segment_attention
from tunelab.models.virtual_rows import VirtualKeys
from tunelab.types import Segment

PACKED_ATTENTION = "tunelab_packed"
PLAIN_ATTENTION = "sdpa"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_segments: tuple[Segment, ...] | None = None,
    packed_keys: VirtualKeys | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row.

    query: (1, H, T, K); key, value: (1, H_kv, T, K) with H a multiple of H_kv (grouped-query attention).
    Returns ((1, T, H, K), None), as transformers expects. Without `packed_segments` the row is one sequence.
    packed_keys: what stands before each root segment's keys and values in this layer.
    Raises ValueError for what this attention does not compute (masks, soft caps, sliding windows, sinks), so that an
    unsupported model is refused rather than trained wrongly.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention mask")
    segments = packed_segments or (Segment(0, query.shape[2]),)
    if packed_keys is not None:
        segments = packed_keys.expansion.segments
    longest = max(segment.prefix_length + segment.stop - segment.start for segment in segments)
    for name in ("softcap", "sliding_window", "s_aux", "position_bias"):
        setting = kwargs.get(name)
        # A sliding window no shorter than the longest sequence never hides anything.
        if setting is not None and not (name == "sliding_window" and isinstance(setting, int) and setting >= longest):
            raise ValueError(f"packed attention does not implement {name} {setting}")
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = plan_parts(tuple(segments))
    if packed_keys is not None:
        layer: Any = module.layer_idx
        shape = (queries.shape[1], keys.shape[1], keys.shape[1])
        packed = packed_keys.before(torch.cat((queries, keys, values), dim=1).flatten(1), layer)
        queries, keys, values = packed.unflatten(1, (-1, query.shape[-1])).split(shape, dim=1)
        parts = plan_parts(tuple(segments), packed_keys.expansion.tokens)
    attended = segment_attention(queries, keys, values, parts, scale, dropout)
    return attended.unflatten(1, (query.shape[1], -1))[None], None


def register_packed_attention() -> None:
    """Make `PACKED_ATTENTION` known to transformers; idempotent. Called where a packed model is set up."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the body with another attention implementation; the previous one is restored afterwards."""
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def plain_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """transformers' own attention, with its masks and caches: for generation and the padded layout.

    That is SDPA, except for architectures that have none and rest in `eager`.
    """
    if model.config._attn_implementation == "eager":
        return nullcontext()
    return attention_implementation(model, PLAIN_ATTENTION)
