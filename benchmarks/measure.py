"""Memory, clock and matmul ceiling, measured the same way on both sides. torch is the only dependency."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

VERSIONS = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "numpy", "tunelab")

CPU_SHAPES = ((2048, 2048, 2048), (1600, 768, 3072), (1600, 3072, 768), (1600, 576, 1536))
CUDA_SHAPES = ((8192, 8192, 8192), (16384, 768, 3072), (16384, 4096, 4096))
"""(m, k, n) of the products the ceiling is the best of: a large square one, and the layers of the models measured."""

CEILING_SECONDS = 0.5
"""How long each shape is repeated."""


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers, those that are installed here; and of Python."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class MemoryMeter:
    """Peak memory above what the imports take.

    Made after every import and before any weight is read. On the CPU the kernel's high-water mark of resident memory
    (VmHWM) is reset then, where it may be (`/proc/self/clear_refs`, Linux ≥ 4.0); the imports' own peak is far below
    any model's, so an unreset mark gives the same figure.
    """

    def __init__(self, device: str) -> None:
        gc.collect()
        self.device = device
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.imports = _status("VmRSS")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def result(self) -> dict[str, int]:
        """Bytes."""
        peak = _status("VmHWM")
        found = {"imports": self.imports, "peak": peak, "peak_above_imports": peak - self.imports}
        if self.device == "cuda":
            found["cuda_allocated"] = torch.cuda.max_memory_allocated()
            found["cuda_reserved"] = torch.cuda.max_memory_reserved()
        return found


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def synchronize(device: str) -> None:
    """Wait for queued kernels, so that the clock sees work and not its queueing."""
    if device == "cuda":
        torch.cuda.synchronize()


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def matmul_ceiling(device: str, precision: str) -> dict[str, Any]:
    """FLOP/s of the fastest of a few dense products, in the precision and with the threads of the measured work.

    `libraries` gives the best of each library at hand, `best` the best of all.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    libraries: dict[str, Product] = {"torch.mm": torch.mm}
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        libraries["oneDNN"] = _onednn
    rates = {
        library: max(_product_rate(*shape, dtype, device, product) for shape in shapes)
        for library, product in libraries.items()
    }
    return {"best": max(rates.values()), "libraries": rates}


def _onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Of the same torch, and on some processors twice as fast in float32 as what `torch.mm` calls."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return found


def _product_rate(m: int, k: int, n: int, dtype: torch.dtype, device: str, product: Product) -> float:
    left, right = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
    fastest = float("inf")
    started = time.perf_counter()
    while time.perf_counter() - started < CEILING_SECONDS:
        synchronize(device)
        began = time.perf_counter()
        product(left, right)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * m * k * n / fastest
