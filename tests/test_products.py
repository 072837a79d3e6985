"""Products through oneDNN against float64, for every layout the engine hands them."""

from __future__ import annotations

import pytest
import torch

from tunelab.products import linear, product


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 130])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_x_times_the_transposed_weight(rows: int, biased: bool) -> None:
    x, weight, bias = draw(rows, 48), draw(33, 48), draw(33) if biased else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    strided = weight.T.contiguous().T  # GPT-2's Conv1D keeps (in, out)
    torch.testing.assert_close(linear(x, strided, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_strides_of_slices_and_transposes() -> None:
    """Gradients of weights are products of transposes; queries, keys and values are columns of one tensor."""
    wide, grad = draw(20, 96), draw(20, 31)
    part = wide[:, 16:40]
    expected = part.double().T @ grad.double()
    torch.testing.assert_close(product(part.T, grad).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(grad.T, part).double(), expected.T, rtol=1e-5, atol=1e-5)


def test_other_precisions_stay_in_theirs() -> None:
    x, weight = draw(3, 8).bfloat16(), draw(5, 8).bfloat16()
    assert linear(x, weight).dtype == torch.bfloat16
    torch.testing.assert_close(linear(x, weight), torch.nn.functional.linear(x, weight))


def test_the_same_bits_every_time() -> None:
    x, weight = draw(257, 96), draw(65, 96)
    first = linear(x, weight)
    assert all(torch.equal(first, linear(x, weight)) for _ in range(5))


def test_without_onednn_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, weight = draw(4, 8), draw(5, 8)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
