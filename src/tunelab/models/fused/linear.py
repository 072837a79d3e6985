"""Projections on plain tensors: forward, and the gradients by hand, accumulated where they are wanted.

Nothing here knows autograd. `wanted` flags follow `Projection.tensors()`: weight, bias, adapter down, adapter up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunelab.models.fused.architecture import Projection

Gradients = list[Tensor | None]


def matrix(projection: Projection, dtype: torch.dtype) -> Tensor:
    """(in, out) weight in the precision of the product."""
    weight = projection.weight.to(dtype)
    return weight if projection.input_first else weight.T


def project(x: Tensor, projection: Projection, out: Tensor) -> Tensor | None:
    """Write x·W + b [+ s·(x·Aᵀ)·Bᵀ] to `out`, (T, out), which may be a slice of a wider tensor.

    Returns x·Aᵀ, (T, r), for the backward pass; None without an adapter.
    """
    if projection.bias is None:
        torch.mm(x, matrix(projection, x.dtype), out=out)
    else:
        torch.addmm(projection.bias.to(x.dtype), x, matrix(projection, x.dtype), out=out)
    low = projection.adapter
    if low is None:
        return None
    reduced = x @ low.down.to(x.dtype).T
    out.addmm_(reduced, low.up.to(x.dtype).T, alpha=low.scaling)
    return reduced


def add_projection(x: Tensor, projection: Projection, residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """residual + x·W + b [+ s·(x·Aᵀ)·Bᵀ] in the residual's precision, and x·Aᵀ."""
    if x.dtype == residual.dtype:
        out = torch.addmm(residual, x, matrix(projection, x.dtype))
        if projection.bias is not None:
            out.add_(projection.bias)
        low = projection.adapter
        if low is None:
            return out, None
        reduced = x @ low.down.to(x.dtype).T
        return out.addmm_(reduced, low.up.to(x.dtype).T, alpha=low.scaling), reduced
    out = torch.empty(x.shape[0], projection.num_outputs, dtype=x.dtype, device=x.device)
    kept = project(x, projection, out)
    return residual + out, kept


def input_gradient(
    grad: Tensor, projection: Projection, reduced_grad: Tensor | None, onto: Tensor | None = None
) -> Tensor:
    """∂/∂x = g·Wᵀ [+ (s·g·B)·A], added to `onto` in place where given. `reduced_grad`: see `adapter_gradient`."""
    transposed = matrix(projection, grad.dtype).T
    out = grad @ transposed if onto is None else onto.addmm_(grad, transposed)
    if projection.adapter is not None and reduced_grad is not None:
        out.addmm_(reduced_grad, projection.adapter.down.to(grad.dtype))
    return out


def adapter_gradient(grad: Tensor, projection: Projection) -> Tensor | None:
    """s·g·B, (T, r): the gradient of x·Aᵀ; None without an adapter."""
    low = projection.adapter
    return None if low is None else (grad @ low.up.to(grad.dtype)).mul_(low.scaling)


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
        product = x.T @ grad if projection.input_first else grad.T @ x
        found[0] = product.to(projection.weight.dtype)
    if bias and projection.bias is not None:
        found[1] = grad.sum(0).to(projection.bias.dtype)
    low = projection.adapter
    if low is not None:
        if down:
            assert x is not None
            assert reduced_grad is not None
            found[2] = (reduced_grad.T @ x).to(low.down.dtype)
        if up:
            assert reduced is not None
            found[3] = (grad.T @ reduced).mul_(low.scaling).to(low.up.dtype)
    return found
