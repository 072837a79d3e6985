"""Each check against a machine that is well, poor or broken."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from tunelab import doctor
from tunelab.cli import main

REQUIRES = [
    "torch>=2.11",
    "rich>=13.9",
    'datasets>=4; extra == "hub"',
    'wandb; extra == "wandb"',
    'ruff; extra == "dev"',
]
GIB = 2**30


def test_this_machine_is_fit_for_the_tests(tmp_path: Path) -> None:
    checks = doctor.examine(tmp_path)
    names = [check.name for check in checks]
    assert names[0] == "python"
    assert {"torch", "device", "threads", "memory", "disk, runs", "disk, cache", "models", "extras"} <= set(names)
    assert all(check.mend for check in checks if check.status != "ok")
    assert [check for check in checks if check.status == "fail"] == []


def test_python() -> None:
    assert doctor.check_python((3, 11, 0)).status == "ok"
    old = doctor.check_python((3, 10, 14))
    assert (old.status, old.found) == ("fail", "3.10.14")


def test_packages() -> None:
    versions = {"torch": "2.9.1", "rich": "13.9"}
    torch, rich = doctor.check_packages(REQUIRES, versions.get)
    assert (torch.status, torch.found, torch.mend) == (
        "warn",
        "2.9.1, supported is >=2.11",
        "pip install 'torch>=2.11'",
    )
    assert (rich.status, rich.found) == ("ok", "13.9")
    missing = doctor.check_packages(REQUIRES, lambda name: None)[0]
    assert (missing.status, missing.mend) == ("fail", "pip install 'torch>=2.11'")
    assert doctor.check_packages(["torch>=2.11"], lambda name: "2.14.0.dev1+cu130")[0].status == "ok"


def test_extras_are_never_a_fault() -> None:
    check = doctor.check_extras(REQUIRES, {"datasets": "4"}.get)
    assert check.status == "ok"
    assert check.found == "installed: hub; not installed: wandb (pip install 'tunelab[wandb]')"
    assert doctor.check_extras(REQUIRES, lambda name: "1").found == "installed: hub, wandb"


def fake_torch(cuda: bool = False, bf16: bool = True, mps: bool = False) -> Any:
    properties = types.SimpleNamespace(name="Tesla T4", total_memory=15 * GIB)
    return types.SimpleNamespace(
        __version__="2.13.0+cpu",
        cuda=types.SimpleNamespace(
            is_available=lambda: cuda,
            current_device=lambda: 0,
            get_device_properties=lambda index: properties,
            is_bf16_supported=lambda including_emulation: bf16,
        ),
        backends=types.SimpleNamespace(mps=types.SimpleNamespace(is_available=lambda: mps)),
    )


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_device(fake_torch(cuda=True, bf16=False)).found == "cuda: Tesla T4, 15.0 GiB, fp16 (no bf16)"
    assert doctor.check_device(fake_torch(cuda=True)).found.endswith("bf16")
    assert doctor.check_device(fake_torch(mps=True)).found.startswith("mps")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_device(fake_torch()).status == "ok"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    wasted = doctor.check_device(fake_torch())
    assert wasted.status == "warn"
    assert "CUDA build of torch" in wasted.mend


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert doctor.check_threads(4, 8).status == "ok"  # torch's own choice: physical cores
    assert doctor.check_threads(8, 2).mend == "set OMP_NUM_THREADS=2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.check_threads(1, 8).status == "warn"


@pytest.mark.parametrize(("gib", "status"), [(0.5, "fail"), (3, "warn"), (8, "ok")])
def test_memory(gib: float, status: str) -> None:
    assert doctor.check_memory(int(gib * GIB)).status == status


def test_memory_of_a_container(tmp_path: Path) -> None:
    """16 GiB are free on the host; the container may have 4 and uses 1: 3 are left."""
    (tmp_path / "meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    assert doctor.available_memory(tmp_path, tmp_path) == 16 * GIB
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    assert doctor.available_memory(tmp_path, tmp_path) == 3 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.available_memory(tmp_path, tmp_path) == 16 * GIB
    assert doctor.available_memory(tmp_path / "nowhere", tmp_path) is None
    assert doctor.check_memory(None).status == "ok"


@pytest.mark.parametrize(("gib", "status"), [(0.1, "fail"), (2, "warn"), (50, "ok")])
def test_disk(gib: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(free=int(gib * GIB))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert doctor.check_disk("disk", tmp_path / "not" / "yet" / "made").status == status


def test_a_folder_one_may_not_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    check = doctor.check_disk("disk", tmp_path / "runs")
    assert (check.status, check.found) == ("fail", f"{tmp_path} is not writable")


def test_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file\n")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    (check,) = doctor._torch_checks()
    assert check.status == "fail"
    assert check.found == "torch cannot be imported (libcudart.so.13: cannot open shared object file)"


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda runs_dir: [doctor.Check("python", "ok", "3.11.7")])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok    python  3.11.7\n"
    monkeypatch.setattr(doctor, "examine", lambda runs_dir: [doctor.Check("disk", "fail", "0 B free", "free some")])
    assert main(["doctor"]) == 4
    assert capsys.readouterr() == ("fail  disk  0 B free → free some\n", "")
    assert main(["doctor", "--json"]) == 4
    assert '"ok": false' in capsys.readouterr().out
