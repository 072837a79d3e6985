"""Projections on plain tensors: forward, and the gradients by hand, accumulated where they are wanted.

Nothing here knows autograd. `wanted` flags follow `Projection.tensors()`. A packed weight is dequantised whenever it
multiplies, in the forward and in the backward pass, and never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from tunelab.models.fused.architecture import LowRank, Projection
from tunelab.models.quantised import dense
from tunelab.products import linear, product

Gradients = list[Tensor | None]

Kept = tuple[Tensor | None, Tensor | None, Tensor | None]
"""For the backward pass, with an adapter: x·Aᵀ, (T, r); with DoRA also the sum before it is scaled, (T, out), and the
lengths of the rows of W + s·B·A, (out,) float32.
"""


def flat(kept: Sequence[Kept]) -> list[Tensor | None]:
    return list(chain.from_iterable(kept))


def unflat(tensors: Sequence[Tensor | None]) -> list[Kept]:
    return list(zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True))


def matrix(projection: Projection, dtype: torch.dtype) -> Tensor:
    """(in, out) weight in the precision of the product."""
    weight = dense(projection.weight).to(dtype)
    return weight if projection.input_first else weight.T


def projected(x: Tensor, projection: Projection) -> tuple[Tensor, Kept]:
    """The projection of x: (T, in) → (T, out); and what its backward pass needs."""
    weight, low = matrix(projection, x.dtype), projection.adapter
    bias = summed_bias(projection, x.dtype)
    if low is None:
        return linear(x, weight.T, bias), (None, None, None)
    reduced, up = linear(x, low.down.to(x.dtype)), low.up.to(x.dtype)
    if low.magnitude is None:
        return linear(x, weight.T, bias).addmm_(reduced, up.T, alpha=low.scaling), (reduced, None, None)
    total = linear(x, weight.T).addmm_(reduced, up.T, alpha=low.scaling)
    lengths = row_lengths(projection)
    ratio = (low.magnitude / lengths).to(x.dtype)
    out = total * ratio if bias is None else torch.addcmul(bias, total, ratio)
    return out, (reduced, total, lengths)


def summed_bias(projection: Projection, dtype: torch.dtype) -> Tensor | None:
    """b [+ s·b_B], (out,): added once."""
    bias, low = projection.bias, projection.adapter
    if low is None or low.bias is None:
        return None if bias is None else bias.to(dtype)
    extra = low.scaling * low.bias
    return (extra if bias is None else bias + extra).to(dtype)


def row_lengths(projection: Projection) -> Tensor:
    """‖W_j + s·B_j·A‖ of every output j: (out,) float32, without making the sum.

    ‖W_j‖² + 2s·B_j·(A·W_j) + s²·B_j·(A·Aᵀ)·B_jᵀ: r·in·out multiplications, as many as a product with r tokens.
    """
    low = projection.adapter
    assert low is not None
    weight = dense(projection.weight).float()
    weight = weight.T if projection.input_first else weight
    return _row_lengths(weight, low)


def _row_lengths(weight: Tensor, low: LowRank) -> Tensor:
    down, up = low.down.float(), low.up.float()
    own = torch.linalg.vector_norm(weight, dim=1).square_()
    beside = linear(weight, down).mul_(2.0).add_(linear(up, linear(down, down)), alpha=low.scaling)
    return own.add_((beside * up).sum(1), alpha=low.scaling).clamp_(min=0.0).sqrt_()


def side_by_side(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, list[Kept]]:
    """The outputs of several projections in one tensor, (T, sum of out), and what each one's backward pass needs."""
    if len(projections) == 1:
        out, kept = projected(x, projections[0])
        return out, [kept]
    widths = [projection.num_outputs for projection in projections]
    out = x.new_empty(x.shape[0], sum(widths))
    every = []
    for projection, part in zip(projections, out.split(widths, dim=1), strict=True):
        found, kept = projected(x, projection)
        part.copy_(found)
        every.append(kept)
    return out, every


def add_projection(x: Tensor, projection: Projection, residual: Tensor) -> tuple[Tensor, Kept]:
    """residual + the projection of x, in the residual's precision; and what the backward pass needs."""
    out, kept = projected(x, projection)
    return (out.add_(residual) if out.dtype == residual.dtype else out + residual), kept


def gradients(
    grad: Tensor,
    x: Tensor | None,
    projection: Projection,
    kept: Kept,
    wanted: Sequence[bool],
    *,
    wants_x: bool = True,
    onto: Tensor | None = None,
) -> tuple[Gradients, Tensor | None]:
    """From the gradient of a projection's output, those of its tensors and of its input, where wanted.

    Those of tensors have the tensors' own precisions. That of x is added to `onto` in place where given. `x` may be
    None if no gradient of weight or A is wanted. DoRA's lengths are constants here (Liu et al. 2024, sec. 4.3): m has
    the gradient of a factor, and what lies before it sees the gradient m/‖·‖ times.
    """
    reduced, total, lengths = kept
    low = projection.adapter
    found: Gradients = [None] * 6
    if wanted[1] and projection.bias is not None:
        found[1] = grad.sum(0).to(projection.bias.dtype)
    if low is not None:
        if low.bias is not None and wanted[4]:
            found[4] = grad.sum(0).mul_(low.scaling).to(low.bias.dtype)
        if low.magnitude is not None:
            assert total is not None
            assert lengths is not None
            if wanted[5]:
                found[5] = (grad * total).sum(0, dtype=torch.float32).div_(lengths).to(low.magnitude.dtype)
            grad = grad * (low.magnitude / lengths).to(grad.dtype)
    reduced_grad = None if low is None else product(grad, low.up.to(grad.dtype)).mul_(low.scaling)
    if wanted[0]:
        assert x is not None
        of_weight = product(x.T, grad) if projection.input_first else product(grad.T, x)
        found[0] = of_weight.to(projection.weight.dtype)
    if low is not None:
        if wanted[2]:
            assert x is not None
            assert reduced_grad is not None
            found[2] = product(reduced_grad.T, x).to(low.down.dtype)
        if wanted[3]:
            assert reduced is not None
            found[3] = product(grad.T, reduced).mul_(low.scaling).to(low.up.dtype)
    return found, _input_gradient(grad, projection, reduced_grad, onto) if wants_x else None


def _input_gradient(grad: Tensor, projection: Projection, reduced_grad: Tensor | None, onto: Tensor | None) -> Tensor:
    """g·Wᵀ [+ (s·g·B)·A], added to `onto` in place where given."""
    out = linear(grad, matrix(projection, grad.dtype))
    if onto is not None:
        out = onto.add_(out)
    if projection.adapter is not None and reduced_grad is not None:
        out.addmm_(reduced_grad, projection.adapter.down.to(grad.dtype))
    return out
