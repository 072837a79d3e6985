"""Attention over packed rows, registered through transformers' public `AttentionInterface`.

A packed row holds many sequences end to end; each `Segment` attends causally to itself and fully to its prefix (the
shared prompt of a pair), and never across sequences. One SDPA call per segment: no T×T mask is ever built.

transformers hands keyword arguments of the model's forward to the attention function, so the segments travel with the
call: no global state. A model whose attention ignores the interface is found out by `packed.probe_layout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row.

    query: (1, H, T, K); key, value: (1, H_kv, T, K) with H a multiple of H_kv (grouped-query attention).
    Returns ((1, T, H, K), None), as transformers expects. Without `packed_segments` the row is one sequence.
    Raises ValueError for what this attention does not compute (masks, soft caps, sliding windows, sinks), so that an
    unsupported model is refused rather than trained wrongly.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention mask")
    segments = packed_segments or (Segment(0, query.shape[2]),)
    longest = max(segment.prefix_length + segment.stop - segment.start for segment in segments)
    for name in ("softcap", "sliding_window", "s_aux", "position_bias"):
        setting = kwargs.get(name)
        # A sliding window no shorter than the longest sequence never hides anything.
        if setting is not None and not (name == "sliding_window" and isinstance(setting, int) and setting >= longest):
            raise ValueError(f"packed attention does not implement {name} {setting}")
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for segment in segments:
        own = slice(segment.start, segment.stop)
        keys, values, mask = key[:, :, own], value[:, :, own], None
        if segment.prefix_length:
            prefix = slice(segment.prefix_start, segment.prefix_stop)
            keys = torch.cat((key[:, :, prefix], keys), dim=2)
            values = torch.cat((value[:, :, prefix], values), dim=2)
            mask = _bottom_right_causal(segment.stop - segment.start, keys.shape[2], query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, own],
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _bottom_right_causal(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(Q, K) bool, True = attend: the last query sees every key. SDPA's own `is_causal` aligns top-left."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


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
