"""Norms, activations and rotary positions on plain tensors, forward and backward, with few passes over memory.

On a CPU these passes are bound by memory, and a fresh large tensor costs more than the pass that fills it: hence the
in-place arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tunelab.models.fused.architecture import Activation, Norm


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm or RMSNorm of (T, D), in x's precision (statistics in float32)."""
    if not norm.root_mean_square:
        weight, bias = _in_dtype(norm, x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    if x.dtype != torch.float32:
        return norm.weight * (x.float() * _inverse_root_mean_square(x.float(), norm.eps)).to(x.dtype)
    return (x * _inverse_root_mean_square(x, norm.eps)).mul_(norm.weight)


def _in_dtype(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the precision of what they are multiplied with."""
    return norm.weight.to(dtype), None if norm.bias is None else norm.bias.to(dtype)


def _narrowed(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)


def _inverse_root_mean_square(x: Tensor, eps: float) -> Tensor:
    """(T, 1): 1/√(mean x² + ε)."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return mean_square.add_(eps).rsqrt_()


def normalise_backward(
    grad: Tensor, x: Tensor, norm: Norm, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, where wanted. `grad` may be overwritten."""
    if not norm.root_mean_square:
        scale, bias = _in_dtype(norm, x.dtype)
        _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], scale, bias, norm.eps)
        biased = wanted[2] and norm.bias is not None
        grad_x, grad_scale, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad.to(x.dtype), x, x.shape[-1:], mean, rstd, scale, bias, [wanted[0], wanted[1], biased]
        )
        return grad_x, _narrowed(grad_scale, norm.weight), _narrowed(grad_bias, norm.bias)
    # y = w·x̂, x̂ = x/rms: ∂x = (w·g − x̂·mean(w·g·x̂))/rms
    weight, wide, grad = norm.weight.float(), x.float(), grad.float()
    inverse = _inverse_root_mean_square(wide, norm.eps)
    unit = wide * inverse
    product = unit * grad
    grad_weight = product.sum(0).to(norm.weight.dtype) if wanted[1] else None
    if not wanted[0]:
        return None, grad_weight, None
    mean = (product @ weight).div_(x.shape[-1])[:, None]
    grad_x = grad.mul_(weight).addcmul_(unit, mean, value=-1.0).mul_(inverse)
    return grad_x.to(x.dtype), grad_weight, None


def rotate_(part: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary positions in place: (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin), the halves of each head.

    part: (T, heads, head_size); cos, sin: (T, 1, head_size/2). With −sin it is its own inverse, and its own adjoint's:
    Su et al. 2021, "RoFormer", eq. 34, in the half-split order of Llama.
    """
    half = part.shape[-1] // 2
    first, second = part[..., :half], part[..., half:]
    rotated = (first * cos).addcmul_(second, sin, value=-1.0)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)


def activate(pre: Tensor, activation: Activation) -> Tensor:
    """(T, I) from the pre-activation: (T, I), or gate | up (T, 2I) for a SwiGLU."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_backward(grad: Tensor, pre: Tensor, activation: Activation) -> Tensor:
    """Gradient of `pre`. `grad` and `pre` may be overwritten: nothing reads them afterwards."""
    if activation != "swiglu":
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        found: Tensor = torch.ops.aten.gelu_backward(grad, pre, approximate=approximate)
        return found
    gate, up = pre.chunk(2, dim=-1)
    out = torch.empty_like(pre)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(F.silu(gate), grad, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
    return out
