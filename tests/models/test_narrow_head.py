"""Weights stored in bf16 and multiplied in float32: the numbers of a float32 model with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.small_models import as_loaded, small_gpt2, small_llama
from tunelab.errors import ConfigError
from tunelab.models.engine import choose_layout, compute_logprobs
from tunelab.models.fused.embedding import embed_tokens
from tunelab.models.logprobs import token_logprobs
from tunelab.models.packed import _probe_batch
from tunelab.models.tied import TiedGradient
from tunelab.parallel import resolve_precision

ROWS, WIDTH, VOCABULARY = 37, 16, 2500  # three blocks of columns on a CPU, the last one short


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets; the targets include both ends of each block."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    targets[:6] = torch.tensor([0, 1023, 1024, 2047, 2048, 2499])
    return (
        torch.randn(ROWS, WIDTH, generator=generator) * 3,
        torch.randn(VOCABULARY, WIDTH, generator=generator).bfloat16(),
        torch.randn(VOCABULARY, generator=generator).bfloat16(),
        targets,
    )


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_values_and_gradients_are_float64s(tensors: tuple[Tensor, ...], biased: bool, tied: bool) -> None:
    hidden, weight, bias, targets = (t.clone() for t in tensors)
    upstream = torch.randn(ROWS, generator=torch.Generator().manual_seed(1))
    narrow = [t.requires_grad_() for t in (hidden, weight, *([bias] if biased else []))]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    place = TiedGradient() if tied else None
    found = token_logprobs(hidden, weight, targets, bias if biased else None, tied=place)
    expected = reference(exact[0], exact[1], exact[2] if biased else None, targets)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    found.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-5, atol=1e-5)
    of_weight = place.value if place is not None else weight.grad
    assert of_weight is not None
    assert of_weight.dtype == torch.bfloat16
    # Rounded once: to half a unit in the last of bf16's eight places.
    torch.testing.assert_close(of_weight.double(), exact[1].grad, rtol=2.0**-8, atol=1e-6)
    assert (weight.grad is None) == tied
    if biased:
        torch.testing.assert_close(bias.grad.double(), exact[2].grad, rtol=2.0**-8, atol=1e-6)


def test_a_frozen_head_gets_no_gradient(tensors: tuple[Tensor, ...]) -> None:
    hidden, weight, _, targets = tensors
    hidden.requires_grad_()
    token_logprobs(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_logits_far_from_zero_do_not_overflow(tensors: tuple[Tensor, ...]) -> None:
    """Growing from block to block, so that what was summed before is scaled down again."""
    hidden, weight, _, targets = tensors
    bias = torch.linspace(-300, 300, VOCABULARY).bfloat16()
    found = token_logprobs(hidden, weight, targets, bias)
    expected = reference(hidden.double(), weight.double(), bias.double(), targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "tied llama"])
def test_a_stored_model_computes_what_a_float32_model_of_its_weights_does(name: str) -> None:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = small_gpt2(**dropout) if name == "gpt2" else small_llama(tie_word_embeddings=name == "tied llama")
    model = model.to(torch.bfloat16)
    stored, wide = as_loaded(model), as_loaded(copy.deepcopy(model).float())
    stored.precision = resolve_precision("bf16-stored", stored.device)
    for loaded in (stored, wide):
        choose_layout(loaded, "packed", 64)
    assert stored.shortcuts.float32_products
    batch = _probe_batch(model)
    found, expected = compute_logprobs(stored, batch), compute_logprobs(wide, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    for (parameter, one), two in zip(stored.model.named_parameters(), wide.model.parameters(), strict=True):
        assert one.grad.dtype == torch.bfloat16
        # A tied weight's two gradients are rounded one after the other, each to its own size.
        atol = 2.0**-8 * two.grad.abs().max().item() if one is stored.model.get_output_embeddings().weight else 1e-6
        torch.testing.assert_close(one.grad.float(), two.grad, rtol=2.0**-7, atol=atol, msg=parameter)


def test_a_frequent_tokens_gradient_adds_up_in_float32() -> None:
    """In bf16, 600 times 1 is 256: 256 + 1 rounds back to 256."""
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([1] * 600 + [2])
    embed_tokens(ids, weight, torch.float32).sum().backward()
    assert weight.grad[:, 0].tolist() == [0.0, 600.0, 1.0]


@pytest.mark.parametrize(("layout", "kernels"), [("padded", "auto"), ("packed", "plain")])
def test_modules_that_multiply_in_their_weights_precision_are_refused(layout: Any, kernels: Any) -> None:
    stored = as_loaded(small_llama().to(torch.bfloat16))
    stored.precision = resolve_precision("bf16-stored", stored.device)
    with pytest.raises(ConfigError, match=r"model\.precision: bf16-stored multiplies in float32"):
        choose_layout(stored, layout, 64, kernels)
