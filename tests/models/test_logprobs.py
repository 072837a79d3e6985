"""Chunked log-probabilities against `log_softmax(hidden @ W.T + b)` and its autograd gradients."""

from __future__ import annotations

import pytest
import torch

from tunelab.models.logprobs import token_logprobs


def inputs(num: int, width: int = 8, vocab: int = 33, *, bias: bool, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(num)
    hidden = torch.randn(num, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    offset = torch.randn(vocab, generator=generator, dtype=dtype).requires_grad_() if bias else None
    targets = torch.randint(0, vocab, (num,), generator=generator)
    return hidden, weight, targets, offset


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("num", "chunk"), [(1, 512), (7, 3), (9, 3), (12, 1), (5, 5), (6, 4)])
def test_equals_log_softmax_with_every_gradient(num: int, chunk: int, bias: bool) -> None:
    hidden, weight, targets, offset = inputs(num, bias=bias)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
    logits = hidden @ weight.T if offset is None else hidden @ weight.T + offset
    expected = logits.log_softmax(-1)[torch.arange(num), targets]
    found = token_logprobs(hidden, weight, targets, offset, chunk_size=chunk)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(num, generator=torch.Generator().manual_seed(99))
    for one, other in zip(
        torch.autograd.grad(found, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_no_positions_give_no_logprobs_and_zero_gradients() -> None:
    hidden, weight, targets, _ = inputs(4, bias=False)
    found = token_logprobs(hidden[:0], weight, targets[:0])
    assert found.shape == (0,)
    found.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    found = token_logprobs(hidden, weight, torch.tensor([0, 0]))
    assert found.tolist() == [0.0, -1e4]
    found.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_bf16_hidden_states_sum_in_float32() -> None:
    """In bf16 the products round (8 bits), the log-sum-exp does not: within 1% of float32."""
    hidden, weight, targets, _ = inputs(20, bias=False)
    exact = token_logprobs(hidden, weight, targets)
    rough = token_logprobs(hidden.bfloat16(), weight, targets)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.05)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets, _ = inputs(6, bias=False)
    frozen = weight.detach()
    token_logprobs(hidden, frozen, targets).sum().backward()
    assert hidden.grad is not None
    assert frozen.grad is None


def test_peak_memory_is_one_chunk_of_logits() -> None:
    """Nothing of shape (S, V) is saved for backward: only (S, D), (V, D), targets and the log-sum-exp."""
    hidden, weight, targets, _ = inputs(100, vocab=5000, bias=False)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        token_logprobs(hidden, weight, targets, chunk_size=10)
    assert max(saved) == weight.numel()
    assert sum(saved) < weight.numel() + 2 * hidden.numel() + 2 * len(targets) + 1
