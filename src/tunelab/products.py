"""Matrix products on plain tensors, through the faster of the libraries at hand. Nothing here knows autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b: (T, in) by (out, in), as `F.linear`; any strides; without autograd and autocast.

    `F.linear` in float32 on a CPU calls MKL, which uses AVX-512 on Intel's processors alone and reads weights slowly
    for few rows. oneDNN, which torch calls for every other type, does neither: on an AMD EPYC with AVX-512 large
    products run at 400 GFLOP/s instead of 200. torch has no public switch for it; this operation is the one its own
    compiler emits. It takes plain weights of either layout and makes no copy of them.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a·b: (m, k) by (k, n)."""
    return linear(a, b.T)
