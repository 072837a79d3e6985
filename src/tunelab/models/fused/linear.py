"""Projections on plain tensors: forward, and the gradients by hand, accumulated where they are wanted.

Nothing here knows autograd. `wanted` flags follow `Projection.tensors()`: weight, bias, adapter down, adapter up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunelab.models.fused.architecture import Projection
from tunelab.products import linear, product

Gradients = list[Tensor | None]


def matrix(projection: Projection, dtype: torch.dtype) -> Tensor:
    """(in, out) weight in the precision of the product."""
    weight = projection.weight.to(dtype)
    return weight if projection.input_first else weight.T


def projected(x: Tensor, projection: Projection) -> tuple[Tensor, Tensor | None]:
    """x·W + b [+ s·(x·Aᵀ)·Bᵀ], (T, out), and x·Aᵀ, (T, r)."""
    bias = None if projection.bias is None else projection.bias.to(x.dtype)
    out = linear(x, matrix(projection, x.dtype).T, bias)
    low = projection.adapter
    if low is None:
        return out, None
    reduced = linear(x, low.down.to(x.dtype))
    return out.addmm_(reduced, low.up.to(x.dtype).T, alpha=low.scaling), reduced


def side_by_side(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, list[Tensor | None]]:
    """The outputs of several projections in one tensor, (T, sum of out), and each one's x·Aᵀ."""
    if len(projections) == 1:
        out, reduced = projected(x, projections[0])
        return out, [reduced]
    widths = [projection.num_outputs for projection in projections]
    out = x.new_empty(x.shape[0], sum(widths))
    kept = []
    for projection, part in zip(projections, out.split(widths, dim=1), strict=True):
        found, reduced = projected(x, projection)
        part.copy_(found)
        kept.append(reduced)
    return out, kept


def add_projection(x: Tensor, projection: Projection, residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """residual + x·W + b [+ s·(x·Aᵀ)·Bᵀ] in the residual's precision, and x·Aᵀ."""
    out, reduced = projected(x, projection)
    return (out.add_(residual) if out.dtype == residual.dtype else out + residual), reduced


def input_gradient(
    grad: Tensor, projection: Projection, reduced_grad: Tensor | None, onto: Tensor | None = None
) -> Tensor:
    """∂/∂x = g·Wᵀ [+ (s·g·B)·A], added to `onto` in place where given. `reduced_grad`: see `adapter_gradient`."""
    out = linear(grad, matrix(projection, grad.dtype))
    if onto is not None:
        out = onto.add_(out)
    if projection.adapter is not None and reduced_grad is not None:
        out.addmm_(reduced_grad, projection.adapter.down.to(grad.dtype))
    return out


def adapter_gradient(grad: Tensor, projection: Projection) -> Tensor | None:
    """s·g·B, (T, r): the gradient of x·Aᵀ; None without an adapter."""
    low = projection.adapter
    return None if low is None else product(grad, low.up.to(grad.dtype)).mul_(low.scaling)


def parameter_gradients(
    grad: Tensor,
    x: Tensor | None,
    projection: Projection,
    reduced: Tensor | None,
    reduced_grad: Tensor | None,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of weight, bias, A, B, in their own precisions; None where not wanted. `x` may be None if no gradient
    of weight or A is wanted.
    """
    weight, bias, down, up = wanted
    found: Gradients = [None, None, None, None]
    if weight:
        assert x is not None
        of_weight = product(x.T, grad) if projection.input_first else product(grad.T, x)
        found[0] = of_weight.to(projection.weight.dtype)
    if bias and projection.bias is not None:
        found[1] = grad.sum(0).to(projection.bias.dtype)
    low = projection.adapter
    if low is not None:
        if down:
            assert x is not None
            assert reduced_grad is not None
            found[2] = product(reduced_grad.T, x).to(low.down.dtype)
        if up:
            assert reduced is not None
            found[3] = product(grad.T, reduced).mul_(low.scaling).to(low.up.dtype)
    return found
