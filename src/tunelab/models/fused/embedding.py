"""Embeddings whose gradient joins that of a tied output head, and adds up in float32, instead of beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunelab.models.tied import TiedGradient


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, dtype: torch.dtype, tied: TiedGradient | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.dtype, ctx.tied = weight.shape[0], weight.dtype, tied
        return F.embedding(ids, weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        (grad,) = grads
        total = None
        if ctx.tied is not None:
            total, ctx.tied.value = ctx.tied.value, None
        if ctx.dtype != torch.float32:
            ids, grad = _summed_by_row(ids, grad)
            grad = grad.to(ctx.dtype)
        if total is not None and total.device.type == "cpu":
            # Atomic and so unordered on CUDA; here rows are added one after another.
            return total.index_add_(0, ids, grad), None, None, None
        own: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.num_rows, -1, False)
        return own if total is None else total.add_(own), None, None, None


def _summed_by_row(ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows (R,) and the sum of each one's gradients (R, D) in float32: frequent tokens have hundreds, and
    the sum of so many in bf16 stops growing.
    """
    rows, owner = ids.unique(return_inverse=True)
    return rows, grad.new_zeros(len(rows), grad.shape[1], dtype=torch.float32).index_add_(0, owner, grad.float())


def embed_tokens(ids: Tensor, weight: Tensor, dtype: torch.dtype, tied: TiedGradient | None = None) -> Tensor:
    """(T,) → (T, D) in `dtype`. With `tied`, the gradient of `weight` is what the head left there plus its own."""
    if tied is None and dtype == weight.dtype == torch.float32:
        return F.embedding(ids, weight)
    found: Tensor = _Embedding.apply(weight, ids, dtype, tied)
    return found
