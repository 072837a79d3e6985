"""The machine a run computes on: device, precision, threads, random generators, peak memory.

torch is imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelab.errors import ConfigError, MachineError

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda", "mps")
PRECISIONS = ("float32", "bf16", "bf16-pure", "bf16-stored", "fp16")


@dataclass(frozen=True)
class Precision:
    """In which dtype weights are held, and in which matrix products are computed.

    `compute_dtype` is autocast's, None without autocast; `product_dtype` is that of the products, whoever casts: under
    `bf16-stored` the fused blocks cast a weight when they multiply. `device_type` is the device it was resolved for.
    `needs_scaler`: gradients of fp16 products underflow unless the loss is scaled (Micikevicius et al. 2018, §3.2).
    """

    name: str
    device_type: str
    weights_dtype: torch.dtype
    compute_dtype: torch.dtype | None
    product_dtype: torch.dtype
    needs_scaler: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """The context a forward pass runs in; a new one a call."""
        import torch

        if self.compute_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.compute_dtype)


def available_devices() -> tuple[str, ...]:
    """Kinds of device this machine has."""
    import torch

    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return tuple(name for name in DEVICES if found[name])


def resolve_device(name: str) -> torch.device:
    """`auto` takes cuda, else mps, else cpu. Raises MachineError if the named device is not there."""
    import torch

    available = available_devices()
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if device in available)
    elif name not in DEVICES:
        raise ConfigError(f"model.device: '{name}' is not a device; give auto, {', '.join(DEVICES)}")
    elif name not in available:
        cause = f" (torch {torch.__version__} finds none)" if name == "cuda" else ""
        raise MachineError(
            f"model.device: this machine has no {name}{cause}; it has {', '.join(available)}: set that, or auto"
        )
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision `name` on `device`. `auto`: float32 on cpu and mps; bf16 on a card that has it, else fp16.

    Raises MachineError where the device cannot compute in it at a useful speed.
    """
    import torch

    kind = device.type
    has_bf16 = kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "float32" if kind != "cuda" else ("bf16" if has_bf16 else "fp16")
    if name not in PRECISIONS:
        raise ConfigError(f"model.precision: '{name}' is not a precision; give auto, {', '.join(PRECISIONS)}")
    if name == "fp16" and kind != "cuda":
        raise MachineError(
            f"model.precision: fp16 on {kind} has no fast matrix products and needs a CUDA gradient scaler; "
            "use float32 or bf16"
        )
    if name in ("bf16", "bf16-pure") and not has_bf16:
        card = torch.cuda.get_device_name(device)
        raise MachineError(f"model.precision: {card} only emulates bf16, slowly; use fp16 or float32")
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    weights = torch.bfloat16 if name in ("bf16-pure", "bf16-stored") else torch.float32
    products = torch.float32 if name == "bf16-stored" else compute or weights
    return Precision(name, kind, weights, compute, products, needs_scaler=name == "fp16")


def set_threads(num_threads: int | None) -> int:
    """Use `num_threads` CPU threads, or leave torch's choice (OMP_NUM_THREADS, else the cores); how many it is."""
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Let the C library keep what is freed instead of handing it back to the kernel, which gives it anew page by page.

    A training step frees and takes again the same gigabyte of activations and gradients; on a CPU the page faults of
    that took 5 to 8% of a step's time, and the peak is the same. Blocks of more than 32 MB (glibc's limit) are
    still mapped one by one. Does nothing where the library is not glibc. See docs/engine.md for what else was tried.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held, in bytes.

    cuda: tensors allocated on the device (`torch.cuda.max_memory_allocated`), the device's own peak counter. cpu:
    resident memory, VmHWM on Linux and ru_maxrss elsewhere. mps: what Metal's driver holds now (it keeps no peak, but
    gives little back).
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on the BSDs
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory_bytes` anew where the system allows it, so that a second run in a process has its own peak."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):  # proc(5): 5 resets VmHWM; read-only in some containers, and Linux only
            Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def deterministic() -> Iterator[None]:
    """Within the body torch computes the same bits every time where it knows how.

    On the CPU that is everything tunelab uses. On CUDA cuBLAS needs its workspace fixed before the first call, and
    the backward pass of fused attention stays outside torch's promise (it only warns): bits may differ there.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def device_name(device: torch.device) -> str:
    """What computes, as precisely as its bits depend on it: `cpu`, `mps`, or the name of the CUDA card."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy, and torch on every device. `seed` in [0, 2**32), numpy's range."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def capture_rng() -> dict[str, Any]:
    """The state of every global generator: a flat dict whose values are uint8 tensors or plain JSON, no pickle.

    Keys: `python`, `numpy` (JSON); `torch`, `cuda.0`…, `mps` (tensors, on the CPU).
    """
    import numpy as np
    import torch

    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    rng: dict[str, Any] = {
        "python": {"version": version, "words": list(words), "gauss_next": gauss},
        "numpy": {
            "bit_generator": state["bit_generator"],
            "state": {"key": state["state"]["key"].tolist(), "pos": int(state["state"]["pos"])},
            "has_gauss": int(state["has_gauss"]),
            "gauss": float(state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        rng |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        rng["mps"] = torch.mps.get_rng_state()
    return rng


def restore_rng(rng: dict[str, Any]) -> None:
    """Put back what `capture_rng` returned, also after a round trip through JSON and safetensors.

    The state of a device this machine does not have is left out: nothing here could draw from it. Whether a run may
    continue on another device is the checkpoint's question.
    """
    import numpy as np
    import torch

    python, state = rng["python"], rng["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss_next"]))
    key = np.array(state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state, "state": {"key": key, "pos": state["state"]["pos"]}})
    torch.set_rng_state(rng["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in rng:
            torch.cuda.set_rng_state(rng[f"cuda.{index}"], index)
    if "mps" in rng and torch.backends.mps.is_available():
        torch.mps.set_rng_state(rng["mps"])
