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
from tunelab.models.segments import Part, packed_segment_attention
from tunelab.models.tied import TiedGradient
from tunelab.models.virtual_rows import RowInput, VirtualKeys


def decoder_hidden(
    decoder: Decoder,
    row: RowInput,
    *,
    tied: TiedGradient | None = None,
    prune_last_block: bool = True,
    checkpointing: bool = False,
    float32_products: bool = False,
) -> Tensor:
    """Final-norm hidden states at the loss positions: (S, D), in the precision of the products.

    tied: where the output head of the same weight as the token embedding leaves its gradient. prune_last_block: attend
    from, and run the last MLP on, the positions between each segment's first and last predictor only: nothing else of
    the last block is read. checkpointing: keep each block's input only. float32_products: of weights stored narrower;
    the residual stream is float32 then too.
    """
    device = decoder.tokens.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else decoder.tokens.dtype
    residual_dtype = decoder.tokens.dtype
    if float32_products:
        dtype = residual_dtype = torch.float32
    with torch.autocast(device.type, enabled=False):
        batch, before = row.batch, [None if row.keys is None else (row.keys, i) for i in range(len(decoder.blocks))]
        x, rotary = _embed(decoder, row, tied, residual_dtype)
        everything = row.parts
        for block, keys in zip(decoder.blocks[:-1], before, strict=False):
            x = _run(checkpointing, _block, x, block, rotary, dtype, everything, None, keys)
        last = decoder.blocks[-1]
        if prune_last_block:
            tail = batch.tail
            x = _run(checkpointing, _block, x, last, rotary, dtype, row.tail_parts, tail.kept, before[-1])
            x = x.index_select(0, tail.index)
        else:
            x = _run(checkpointing, _block, x, last, rotary, dtype, everything, None, before[-1])
            x = x.index_select(0, batch.loss_positions)
        return _final_norm(x, decoder).to(dtype)


def _embed(decoder: Decoder, row: RowInput, tied: TiedGradient | None, dtype: torch.dtype) -> tuple[Tensor, Rotary]:
    """(T, D) embeddings and the rotary tables of the row."""
    batch = row.batch
    x = embed_tokens(batch.input_ids, decoder.tokens, dtype, tied)
    if row.edit is not None:
        x = row.edit(x)
    if decoder.positions is not None:
        x = x + embed_tokens(batch.position_ids, decoder.positions, dtype)
    if decoder.rotary is None:
        return x, None
    cos, sin = decoder.rotary(x[None], position_ids=batch.position_ids[None])
    head_size = decoder.blocks[0].head_size
    if cos.shape[-1] != head_size:
        raise NotImplementedError(f"rotary positions turn {cos.shape[-1]} of {head_size} dimensions")
    half = head_size // 2
    return x, (cos[0, :, None, :half], sin[0, :, None, :half])


def _block(
    x: Tensor,
    block: Block,
    rotary: Rotary,
    dtype: torch.dtype,
    parts: tuple[Part, ...],
    kept: Tensor | None,
    before: tuple[VirtualKeys, int] | None,
) -> Tensor:
    """(T, D) → (Q, D); `kept` (Q,) names the rows that are queries, None for all. before: the virtual keys and values
    of the row, and which layer this is.
    """
    packed = block_input(x, block, rotary, dtype)
    if before is not None:
        keys, layer = before
        packed = keys.before(packed, layer)
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
        bias = None if norm.bias is None else norm.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), bias, norm.eps)
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype)
