"""Log-probabilities of targets from hidden states, without ever holding the full logits.

    log p(y_s | h_s) = h_s·W[y_s] + b[y_s] − logsumexp_v(h_s·W[v] + b[v])

A (S, V) float32 logits matrix of GPT-2 with S = 2000 takes 400 MB, and autograd keeps several. Here the S positions are
projected `chunk_size` at a time into one reused buffer, and the gradient is made from each chunk:
    ∂(log p)/∂logits = onehot(y_s) − softmax(logits_s).

There are two ways to the gradient. In general the weight's depends on what the loss does with the log-probabilities, so
backward projects every chunk again. Where the loss is their plain sum (SFT), the gradient of each is the same number,
known up to that factor in the forward pass; and a frozen head (LoRA) needs no gradient of the weight, and that of a
hidden state is known up to a factor of its own whatever the loss. In both cases the gradient is made in the forward
pass, while the chunk is at hand, and one of the products is saved.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tunelab.models.alignment import ALIGNMENT
from tunelab.models.narrow_head import narrow_token_logprobs
from tunelab.models.tied import TiedGradient
from tunelab.products import product

CHUNK_SIZE = 512

CPU_VOCABULARY_BLOCK = 1024
"""Columns of logits in one product on a CPU: one over all of them ran at 300 GFLOP/s where these ran at 430."""


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps the hidden states; backward projects again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_size: int,
        tied: TiedGradient | None,
    ) -> Tensor:
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        head = _Head(weight, bias, hidden, chunk_size)
        for rows in head.chunks():
            logprobs[rows], _ = head.probabilities(rows, targets)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.chunk_size, ctx.tied = chunk_size, tied
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        head = _Head(weight, bias, hidden, ctx.chunk_size)
        found = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for rows in head.chunks():
            _, probabilities = head.probabilities(rows, targets)
            found.add(rows, probabilities, targets, hidden, head, grads[0][rows, None])
        return *_leave(found.results(), ctx.tied), None, None, None


class _EagerTokenLogprobs(torch.autograd.Function):
    """Forward makes the gradients too, for upstream gradients of one; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_size: int,
        tied: TiedGradient | None,
    ) -> Tensor:
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        head = _Head(weight, bias, hidden, chunk_size)
        found = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for rows in head.chunks():
            logprobs[rows], probabilities = head.probabilities(rows, targets)
            found.add(rows, probabilities, targets, hidden, head, None)
        ctx.found, ctx.tied = found, tied
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found: _Gradients = ctx.found
        del ctx.found  # autograd may then add to these tensors in place instead of copying them
        return *_leave(found.results(upstream=grads[0]), ctx.tied), None, None, None


def _leave(
    found: tuple[Tensor | None, Tensor | None, Tensor | None], tied: TiedGradient | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if tied is None:
        return found
    tied.value = found[1]
    return found[0], None, found[2]


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a·b. A product over few positions has a shape that may never come again: MKL keeps nothing of it."""
    return torch.mm(a, b) if min(a.shape) < ALIGNMENT else product(a, b)


class _Head:
    """The output projection of a model, a chunk of positions at a time, into one buffer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, hidden: Tensor, chunk_size: int) -> None:
        # Cast, so that the product runs in the hidden states' precision, as in autocast.
        self.weight, self.bias, self.hidden, self.chunk_size = weight.to(hidden.dtype), bias, hidden, chunk_size
        self.buffer: Tensor | None = None

    def chunks(self) -> list[slice]:
        """Of like size and whole multiples of ALIGNMENT, so that their products' kernels are found again; the few
        positions left over come last (`_multiply`).
        """
        unit = min(ALIGNMENT, self.chunk_size)
        units = self.hidden.shape[0] // unit
        count = -(-units // (self.chunk_size // unit))
        edges = [0, *(units * i // count * unit for i in range(1, count + 1))]
        if edges[-1] < self.hidden.shape[0]:
            edges.append(self.hidden.shape[0])
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def vocabulary_blocks(self) -> list[slice]:
        vocabulary = self.weight.shape[0]
        block = CPU_VOCABULARY_BLOCK if self.weight.device.type == "cpu" else vocabulary
        return [slice(start, min(start + block, vocabulary)) for start in range(0, vocabulary, block)]

    def probabilities(self, rows: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(s,) log-probabilities of the rows' targets and (s, V) float32 probabilities, valid until the next call."""
        logits = self._logits(rows)
        highest, where = logits.max(dim=-1, keepdim=True)
        wanted = logits.gather(1, targets[rows, None])
        torch.softmax(logits, dim=-1, out=logits)
        # The largest probability is at least 1/V, so its logarithm is exact to rounding: logsumexp without a pass.
        logsumexp = highest - logits.gather(1, where).log_()
        return (wanted - logsumexp).squeeze(1), logits

    def _logits(self, rows: slice) -> Tensor:
        part = self.hidden[rows]
        if part.dtype != torch.float32:
            logits = (part @ self.weight.T).float()
        else:
            if self.buffer is None:
                # Chunks differ by one unit.
                self.buffer = part.new_empty(part.shape[0] + ALIGNMENT, self.weight.shape[0])
            logits = self.buffer[: part.shape[0]]
            for columns in self.vocabulary_blocks():
                logits[:, columns] = _multiply(part, self.weight[columns].T)
        return logits if self.bias is None else logits.add_(self.bias.float())


class _Gradients:
    """Gradients of hidden states, weight and bias, summed over chunks; those not wanted are not made."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]) -> None:
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.empty_like(weight, dtype=torch.float32) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        self.empty = True

    def add(
        self, rows: slice, probabilities: Tensor, targets: Tensor, hidden: Tensor, head: _Head, upstream: Tensor | None
    ) -> None:
        """Add a chunk's share. `probabilities` is overwritten. upstream: (s, 1) gradient of each log-probability,
        None for ones.
        """
        # −(onehot − softmax); the sign and the upstream gradient go to the narrow side of each product.
        minus_one = probabilities.new_full((1, 1), -1.0).expand(probabilities.shape[0], 1)
        probabilities.scatter_add_(1, targets[rows, None], minus_one)
        narrow = probabilities.to(hidden.dtype)
        scaled = hidden[rows] if upstream is None else (hidden[rows] * upstream).to(hidden.dtype)
        if self.hidden is not None:
            of_hidden = _multiply(narrow, head.weight).neg_()
            self.hidden[rows] = of_hidden if upstream is None else of_hidden.mul_(upstream)
        if self.weight is not None:
            for columns in head.vocabulary_blocks():
                of_weight = _multiply(narrow[:, columns].T, scaled).float()
                if self.empty:
                    torch.neg(of_weight, out=self.weight[columns])
                else:
                    self.weight[columns].sub_(of_weight)
        if self.bias is not None:
            self.bias -= (probabilities if upstream is None else probabilities * upstream).sum(0)
        self.empty = False

    def results(self, upstream: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the precisions of what they are gradients of. upstream: (S,) the gradients they still have to be
        multiplied by; the weight's and bias's share them, so all are the same where those are wanted.
        """
        if self.empty and self.weight is not None:
            self.weight.zero_()
        found = []
        for tensor, dtype in zip((self.hidden, self.weight, self.bias), self.dtypes, strict=True):
            if tensor is not None and upstream is not None and not self.empty:
                tensor.mul_(upstream[:, None] if tensor is self.hidden else upstream[0])
            found.append(None if tensor is None else tensor.to(dtype))
        return found[0], found[1], found[2]


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    summed: bool = False,
    eager: bool = True,
    tied: TiedGradient | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Natural-log probability of each target.

    hidden: (S, D) at the positions that predict; weight: (V, D) of the output head; bias: (V,) or None; targets: (S,).
    Returns (S,) float32, differentiable in hidden, weight and bias; at most chunk_size × V logits exist at a time.

    summed: the promise that the loss is c·Σ log p, so that every log-probability gets the same gradient c; the weight's
    gradient would be wrong for any other loss. eager: make gradients in the forward pass where that can be done.
    tied: takes the gradient of `weight`, which then is not autograd's to pass on. A weight that is stored in fewer bits
    than hidden has goes another way, whatever the loss (`narrow_head.py`).
    """
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    function = _EagerTokenLogprobs if eager and (summed or frozen) and torch.is_grad_enabled() else _TokenLogprobs
    # The function chooses its own precisions; autocast would turn its float32 sums back into bf16.
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.element_size() < hidden.element_size():
            return narrow_token_logprobs(hidden, weight, targets, bias, tied)
        result: Tensor = function.apply(hidden, weight, bias, targets, chunk_size, tied)
    return result
