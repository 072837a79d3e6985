"""The walk over the blocks: from a packed row to the hidden states that predict its targets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunelab.models.fused.architecture import Block, Decoder
from tunelab.models.fused.blocks import Rotary, block_input, block_output
from tunelab.models.fused.embedding import embed_tokens
from tunelab.models.logprobs import TiedGradient
from tunelab.models.segments import Part, packed_segment_attention, plan_parts
from tunelab.types import Batch


def decoder_hidden(
    decoder: Decoder,
    batch: Batch,
    *,
    tied: TiedGradient | None = None,
    prune_last_block: bool = True,
    checkpointing: bool = False,
) -> Tensor:
    """Final-norm hidden states at the loss positions: (S, D), in the precision of the products.

    tied: where the output head of the same weight as the token embedding leaves its gradient. prune_last_block: attend
    from, and run the last MLP on, the positions between each segment's first and last predictor only: nothing else of
    the last block is read. checkpointing: keep each block's input only.
    """
    device = decoder.tokens.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else decoder.tokens.dtype
    with torch.autocast(device.type, enabled=False):
        x, rotary = _embed(decoder, batch, tied)
        everything = plan_parts(batch.segments)
        for block in decoder.blocks[:-1]:
            x = _run(checkpointing, _block, x, block, rotary, dtype, everything, None)
        last = decoder.blocks[-1]
        if prune_last_block:
            tail = batch.tail
            parts = plan_parts(batch.segments, tail.ranges)
            x = _run(checkpointing, _block, x, last, rotary, dtype, parts, tail.kept)
            x = x.index_select(0, tail.index)
        else:
            x = _run(checkpointing, _block, x, last, rotary, dtype, everything, None)
            x = x.index_select(0, batch.loss_positions)
        return _final_norm(x, decoder).to(dtype)


def _embed(decoder: Decoder, batch: Batch, tied: TiedGradient | None) -> tuple[Tensor, Rotary]:
    """(T, D) embeddings and the rotary tables of the row."""
    x = embed_tokens(batch.input_ids, decoder.tokens, tied)
    if decoder.positions is not None:
        x = x + F.embedding(batch.position_ids, decoder.positions)
    if decoder.rotary is None:
        return x, None
    cos, sin = decoder.rotary(x[None], position_ids=batch.position_ids[None])
    head_size = decoder.blocks[0].head_size
    if cos.shape[-1] != head_size:
        raise NotImplementedError(f"rotary positions turn {cos.shape[-1]} of {head_size} dimensions")
    half = head_size // 2
    return x, (cos[0, :, None, :half], sin[0, :, None, :half])


def _block(
    x: Tensor, block: Block, rotary: Rotary, dtype: torch.dtype, parts: tuple[Part, ...], kept: Tensor | None
) -> Tensor:
    """(T, D) → (Q, D); `kept` (Q,) names the rows that are queries, None for all."""
    packed = block_input(x, block, rotary, dtype)
    attended = packed_segment_attention(packed, block.num_heads, block.num_kv_heads, parts, block.scaling)
    residual = x if kept is None else x.index_select(0, kept)
    return block_output(attended, residual, block, dtype)


def _run(checkpointing: bool, function: Callable[..., Tensor], *arguments: object) -> Tensor:
    if not checkpointing or not torch.is_grad_enabled():
        return function(*arguments)
    found: Tensor = checkpoint(function, *arguments, use_reentrant=False)
    return found


def _final_norm(x: Tensor, decoder: Decoder) -> Tensor:
    """In the precision of x, through autograd's own operations: S rows are few."""
    norm = decoder.final_norm
    if not norm.root_mean_square:
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype)
