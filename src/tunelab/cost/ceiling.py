"""How fast this machine multiplies matrices: what a run's utilisation is a share of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tunelab.products import product

CPU_SHAPES = ((1536, 1536, 1536), (2048, 768, 3072))
"""(m, k, n) of products of the kind training makes, large enough for a few cores' peak."""

CUDA_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192))

CUDA_LAUNCHES = 10
"""Products timed together on CUDA, so that launching does not count."""


def matmul_ceiling(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.3, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of the fastest of a few large products, each the best of its repeats after one to warm up.

    Through the library the engine itself uses (`products.py`). In `dtype`, with the threads and the float32 mode (TF32
    or not) that torch is set to. Takes about `seconds`, or two products a shape where that is more. Draws from no
    global generator.
    """
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    best = max(_best_rate(device, dtype, shape, seconds / len(shapes), clock) for shape in shapes)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the operands are larger than anything a small run would reserve
    return best


def _best_rate(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], seconds: float, clock: Callable[[], float]
) -> float:
    m, k, n = shape
    generator = torch.Generator(device).manual_seed(0)
    left = torch.rand(m, k, generator=generator, device=device).to(dtype)
    right = torch.rand(k, n, generator=generator, device=device).to(dtype)
    launches = CUDA_LAUNCHES if device.type == "cuda" else 1

    def timed() -> float:
        began = clock()
        for _ in range(launches):
            product(left, right)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return clock() - began

    left_over, fastest = seconds - timed(), float("inf")
    while left_over > 0 or fastest == float("inf"):
        elapsed = timed()
        left_over, fastest = left_over - elapsed, min(fastest, elapsed)
    return 2 * m * k * n * launches / fastest
