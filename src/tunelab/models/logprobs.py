"""Log-probabilities of targets from hidden states, without ever holding the full logits.

    log p(y_s | h_s) = h_s·W[y_s] + b[y_s] − logsumexp_v(h_s·W[v] + b[v])

A (S, V) float32 logits matrix of GPT-2 with S = 2000 takes 400 MB, and autograd keeps several. Here the S positions are
projected `chunk_size` at a time, forward keeps only the (S,) log-sum-exp, and backward recomputes each chunk:
    ∂/∂logits = g_s (onehot(y_s) − softmax(logits_s)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_SIZE = 512


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_size: int
    ) -> Tensor:
        num = hidden.shape[0]
        logprobs = torch.empty(num, dtype=torch.float32, device=hidden.device)
        logsumexp = torch.empty_like(logprobs)
        cast = weight.to(hidden.dtype)
        for start in range(0, num, chunk_size):
            rows = slice(start, start + chunk_size)
            logits = _logits(hidden[rows], cast, bias)
            logsumexp[rows] = torch.logsumexp(logits, dim=-1)
            logprobs[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - logsumexp[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        ctx.chunk_size = chunk_size
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        cast = weight.to(hidden.dtype)
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            # softmax − onehot, scaled by −grad, built in place in the one chunk of logits.
            grad_logits = _logits(hidden[rows], cast, bias).sub_(logsumexp[rows, None]).exp_()
            grad_logits.mul_(-grad[rows, None])
            grad_logits.scatter_add_(1, targets[rows, None], grad[rows, None].float())
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            narrow = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = narrow @ cast
            if grad_weight is not None:
                if hidden.dtype == torch.float32:
                    grad_weight.addmm_(narrow.T, hidden[rows])
                else:
                    grad_weight += (narrow.T @ hidden[rows]).float()
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(s, V) float32 logits; `weight` is cast, so the product runs in the hidden states' precision, as in autocast."""
    logits = (hidden @ weight.T).float()
    return logits if bias is None else logits + bias.float()


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """Natural-log probability of each target.

    hidden: (S, D) at the positions that predict; weight: (V, D) of the output head; bias: (V,) or None; targets: (S,).
    Returns (S,) float32, differentiable in hidden, weight and bias; at most chunk_size × V logits exist at a time.
    """
    # The function chooses its own precisions; autocast would turn its float32 sums back into bf16.
    with torch.autocast(hidden.device.type, enabled=False):
        result: Tensor = _TokenLogprobs.apply(hidden, weight, bias, targets, chunk_size)
    return result
