"""The two halves of a block as autograd functions, each keeping the least that its backward pass cannot recompute.

    BlockInput:   x → queries | keys | values, from norm, projections and rotary positions; keeps x alone
    (attention, `models/attention.py`)
    BlockOutput:  attention output, x → x + o(·), then + down(activation(up(norm(·)))); keeps the attention output, the
                  residual between and the pre-activation

Norms and activations are recomputed in the backward pass: an elementwise pass is cheaper than the memory to avoid it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunelab.models.fused.architecture import NUM_TENSORS, Block
from tunelab.models.fused.elementwise import activate, activate_backward, normalise, normalise_backward, rotate_
from tunelab.models.fused.linear import Gradients, add_projection, flat, gradients, side_by_side, unflat

Rotary = tuple[Tensor, Tensor] | None
"""cos and sin, each (T, 1, head_size/2)."""


class _BlockInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, rotary: Rotary, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        hidden = normalise(x, block.input_norm).to(dtype)
        out, kept = side_by_side(hidden, block.inputs)
        _rotate_queries_and_keys(out, block, rotary, inverse=False)
        ctx.block, ctx.rotary, ctx.dtype = block, rotary, dtype
        ctx.save_for_backward(x, *flat(kept))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        block: Block = ctx.block
        # The attention function makes this gradient for us alone, so it may be turned back in place.
        grad = grads[0]
        _rotate_queries_and_keys(grad, block, ctx.rotary, inverse=True)
        wants_x, wanted = ctx.needs_input_grad[0], list(ctx.needs_input_grad[4:])
        norm_wanted, rest = wanted[:2], wanted[2:]
        hidden = normalise(x, block.input_norm).to(ctx.dtype) if any(rest) else None
        below = wants_x or any(norm_wanted)
        widths = [projection.num_outputs for projection in block.inputs]
        found: Gradients = []
        grad_hidden = None
        for i, (projection, part, kept) in enumerate(
            zip(block.inputs, grad.split(widths, dim=1), unflat(saved), strict=True)
        ):
            flags = rest[NUM_TENSORS * i : NUM_TENSORS * (i + 1)]
            own, through = gradients(part, hidden, projection, kept, flags, wants_x=below, onto=grad_hidden)
            found += own
            grad_hidden = through
        norm_grads: Gradients = [None, None]
        grad_x = None
        if grad_hidden is not None:
            grad_x, *norm_grads = normalise_backward(grad_hidden, x, block.input_norm, (wants_x, *norm_wanted))
        return grad_x, None, None, None, *norm_grads, *found


def _rotate_queries_and_keys(packed: Tensor, block: Block, rotary: Rotary, inverse: bool) -> None:
    if rotary is None:
        return
    cos, sin = rotary
    heads = block.num_heads + block.num_kv_heads
    part = packed[:, : heads * block.head_size].unflatten(1, (heads, block.head_size))
    rotate_(part, cos, -sin if inverse else sin)


class _BlockOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, x: Tensor, block: Block, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        middle, kept_output = add_projection(attended, block.output, x)
        hidden = normalise(middle, block.mlp_norm).to(dtype)
        pre, kept_up = side_by_side(hidden, block.up)
        result, kept_down = add_projection(activate(pre, block.activation), block.down, middle)
        ctx.block, ctx.dtype = block, dtype
        ctx.save_for_backward(attended, middle, pre, *flat([kept_output, kept_down, *kept_up]))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        attended, middle, pre, *saved = ctx.saved_tensors
        kept_output, kept_down, *kept_up = unflat(saved)
        block: Block = ctx.block
        grad = grads[0]
        wants_attended, wants_x = ctx.needs_input_grad[:2]
        wanted = list(ctx.needs_input_grad[4:])
        for_output, for_norm, for_up, for_down = _shares(wanted, len(block.up))

        active = activate(pre, block.activation) if any(for_down) else None
        narrow = grad.to(ctx.dtype)
        down_found, grad_active = gradients(narrow, active, block.down, kept_down, for_down)
        del active
        assert grad_active is not None
        grad_pre = activate_backward(grad_active, pre, block.activation)
        del grad_active, pre

        hidden = normalise(middle, block.mlp_norm).to(ctx.dtype) if any(for_up) else None
        up_found: Gradients = []
        grad_hidden: Tensor | None = None
        widths = [projection.num_outputs for projection in block.up]
        for i, (projection, part, kept) in enumerate(
            zip(block.up, grad_pre.split(widths, dim=1), kept_up, strict=True)
        ):
            flags = for_up[NUM_TENSORS * i : NUM_TENSORS * (i + 1)]
            own, grad_hidden = gradients(part, hidden, projection, kept, flags, onto=grad_hidden)
            up_found += own
        assert grad_hidden is not None
        del hidden, grad_pre

        through, *norm_found = normalise_backward(grad_hidden, middle, block.mlp_norm, (True, *for_norm))
        assert through is not None
        grad_middle = through.add_(grad)
        narrow = grad_middle.to(ctx.dtype)
        output_found, grad_attended = gradients(
            narrow, attended, block.output, kept_output, for_output, wants_x=wants_attended
        )
        return (
            grad_attended,
            grad_middle if wants_x else None,
            None,
            None,
            *output_found,
            *norm_found,
            *up_found,
            *down_found,
        )


def _shares(wanted: list[bool], num_up: int) -> tuple[list[bool], tuple[bool, bool], list[bool], list[bool]]:
    """Flags of output, norm, up, down: in the order `block_output` passes their tensors."""
    norm = NUM_TENSORS
    up = norm + 2
    down = up + NUM_TENSORS * num_up
    return wanted[:norm], (wanted[norm], wanted[norm + 1]), wanted[up:down], wanted[down:]


def block_input(x: Tensor, block: Block, rotary: Rotary, dtype: torch.dtype) -> Tensor:
    """Queries | keys | values side by side, rotated where positions are rotary: (T, D) → (T, (H + 2·H_kv)·K).

    `dtype`: of the matrix products, as autocast would choose it.
    """
    tensors = [*block.input_norm.tensors(), *(t for projection in block.inputs for t in projection.tensors())]
    found: Tensor = _BlockInput.apply(x, block, rotary, dtype, *tensors)
    return found


def block_output(attended: Tensor, x: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The block's result from its attention's output (T, H·K) and its input x (T, D): (T, D)."""
    tensors = [
        *block.output.tensors(),
        *block.mlp_norm.tensors(),
        *(t for projection in block.up for t in projection.tensors()),
        *block.down.tensors(),
    ]
    found: Tensor = _BlockOutput.apply(attended, x, block, dtype, *tensors)
    return found
