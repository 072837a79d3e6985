"""Token embedding whose gradient joins that of a tied output head instead of being made beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunelab.models.logprobs import TiedGradient


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.tied = weight.shape[0], tied
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        (grad,) = grads
        total, ctx.tied.value = ctx.tied.value, None
        if total is not None and total.device.type == "cpu":
            # Atomic and so unordered on CUDA; here rows are added one after another.
            return total.index_add_(0, ids, grad.to(total.dtype)), None, None
        own: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.num_rows, -1, False)
        return own if total is None else total.add_(own), None, None


def embed_tokens(ids: Tensor, weight: Tensor, tied: TiedGradient | None) -> Tensor:
    """(T,) → (T, D). With `tied`, the gradient of `weight` is what the head left there plus this embedding's own."""
    if tied is None:
        return F.embedding(ids, weight)
    found: Tensor = _TiedEmbedding.apply(weight, ids, tied)
    return found
