"""The machine a run is forecast for: this one, or one that is not here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from tunelab.parallel import resolve_device

CUDA_CONTEXT_BYTES = 500 << 20
"""A CUDA context with cuBLAS's workspace on a recent card. A stated constant, not measured here; torch's own counter of
allocated memory, which a run records, does not see it."""

FIRST_USE_BYTES = 30 << 20
"""What a CPU process gains when it first computes: code pages of the libraries, their thread pools and tables. Measured
with torch 2.13 as the growth of resident memory over the first products and steps of a model of 0.2 M parameters."""

CEILING_BYTES = 60 << 20
"""What measuring the machine's speed leaves with the C library, which hands it out again (`keep_freed_memory`)."""

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Target:
    """device_type: cpu, cuda or mps. memory_bytes: of it, None where it is not known. memory_source: in words.

    framework_bytes: what the process takes beside the run's tensors. here: whether it is this machine, whose speed can
    be measured. kept_bytes: memory left with the allocator before the run begins, which it uses again.
    """

    device_type: str
    memory_bytes: int | None
    memory_source: str
    framework_bytes: int
    kept_bytes: int
    here: bool


def detect_target(device: str, memory_bytes: int | None = None) -> Target:
    """The machine for `model.device: device`: what it has, or `memory_bytes` where they are given.

    A CUDA card need not be here. The process is measured as it is now: call it with everything imported that a run
    imports, and the data loaded.
    """
    here = device != "cuda" or torch.cuda.is_available()
    device_type = resolve_device(device).type if here else "cuda"
    found, source = (memory_bytes, "given") if memory_bytes is not None else _memory(device_type, here)
    if device_type == "cpu":
        return Target(device_type, found, source, resident_bytes() + FIRST_USE_BYTES, CEILING_BYTES, here)
    return Target(device_type, found, source, CUDA_CONTEXT_BYTES if device_type == "cuda" else 0, 0, here)


def resident_bytes() -> int:
    """Resident memory of this process, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _memory(device_type: str, here: bool) -> tuple[int | None, str]:
    if device_type == "cuda":
        if not here:
            return None, "no CUDA card here; give --memory"
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [limit for path in _CGROUP_LIMITS if (limit := _limit(Path(path))) is not None and limit < total]
    return (min(limits), "this container's limit") if limits else (total, "this machine's memory")


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
