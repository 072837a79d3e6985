"""Log-probabilities of targets from a head that is stored in fewer bits than it is multiplied in.

The numbers of `logprobs.py`, made some columns of the vocabulary at a time instead of some positions: a float32 copy
of the whole weight, or float32 sums for its whole gradient, would each take twice the memory of the weight itself. Here
the gradient of a column is whole after one product over all S positions, and rounded once.

    forward:   Σ_v exp(h·W[v]) grows block by block, with the largest logit so far taken out
    backward:  the logits of a block again; ∂/∂logits = onehot − softmax

as in Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models". One product more than where the
gradient is made in the forward pass; S × BLOCK logits exist at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunelab.models.alignment import ALIGNMENT
from tunelab.models.tied import TiedGradient
from tunelab.products import linear, product

CPU_BLOCK, BLOCK = 1024, 8192
"""Columns at a time, on a CPU and elsewhere: cf. `CPU_VOCABULARY_BLOCK` of `logprobs.py`."""


class _NarrowTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, tied: TiedGradient | None
    ) -> Tensor:
        highest = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=torch.float32)
        total, wanted = torch.zeros_like(highest), torch.zeros_like(highest)
        for columns in _blocks(weight):
            logits = _logits(hidden, weight, bias, columns)
            rows, places = _inside(targets, columns)
            wanted[rows] = logits[rows, places]
            before, highest = highest, torch.maximum(highest, logits.amax(1))
            total.mul_((before - highest).exp_()).add_(logits.sub_(highest[:, None]).exp_().sum(1))
        logsumexp = highest + total.log_()
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        ctx.tied = tied
        return wanted - logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.zeros_like(hidden) if wants_hidden else None
        of_weight = torch.empty_like(weight) if wants_weight else None
        of_bias = torch.empty_like(bias) if bias is not None and wants_bias else None
        for columns in _blocks(weight):
            grad = _logits(hidden, weight, bias, columns).sub_(logsumexp[:, None]).exp_().neg_()
            rows, places = _inside(targets, columns)
            grad[rows, places] += 1.0
            grad = grad.mul_(grads[0][:, None]).to(hidden.dtype)
            if of_hidden is not None:
                of_hidden += product(grad, weight[columns].to(hidden.dtype))
            if of_weight is not None:
                of_weight[columns] = product(grad.T, hidden)
            if of_bias is not None:
                of_bias[columns] = grad.sum(0)
        if ctx.tied is not None:
            ctx.tied.value, of_weight = of_weight, None
        return of_hidden, of_weight, of_bias, None, None


def _blocks(weight: Tensor) -> list[slice]:
    size = CPU_BLOCK if weight.device.type == "cpu" else BLOCK
    return [slice(start, min(start + size, weight.shape[0])) for start in range(0, weight.shape[0], size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    """(S, columns) float32."""
    logits = linear(hidden, weight[columns].to(hidden.dtype)).float()
    return logits if bias is None else logits.add_(bias[columns].float())


def _inside(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The rows whose target is one of `columns`, and which of them it is."""
    rows = ((targets >= columns.start) & (targets < columns.stop)).nonzero().squeeze(1)
    return rows, targets[rows] - columns.start


def narrow_token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, tied: TiedGradient | None
) -> Tensor:
    """As `logprobs.token_logprobs`, for any loss; gradients in the precision of what they are gradients of."""
    num, filler = hidden.shape[0], -hidden.shape[0] % ALIGNMENT  # rows that nobody reads: see `alignment.py`
    hidden, targets = F.pad(hidden, (0, 0, 0, filler)), F.pad(targets, (0, filler))
    found: Tensor = _NarrowTokenLogprobs.apply(hidden, weight, bias, targets, tied)
    return found[:num]
