"""Device, precision, random state."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tunelab.errors import ConfigError, MachineError
from tunelab.parallel import (
    capture_rng,
    peak_memory_bytes,
    resolve_device,
    resolve_precision,
    restore_rng,
    seed_everything,
    set_threads,
)

CPU = torch.device("cpu")


def draws() -> list[float]:
    """One number of every generator, and of the cached second normal each of them keeps."""
    normals = [random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))]
    return [random.random(), float(np.random.rand()), float(torch.rand(())), *normals]


def test_restored_state_repeats_the_stream_after_json_and_safetensors(tmp_path: Path) -> None:
    seed_everything(3)
    draws()  # odd numbers of normals: python's and numpy's generators each hold back a second one
    rng = capture_rng()
    expected = [draws() for _ in range(3)]

    save_file({k: v for k, v in rng.items() if isinstance(v, torch.Tensor)}, tmp_path / "rng.safetensors")
    text = json.dumps({k: v for k, v in rng.items() if not isinstance(v, torch.Tensor)})
    seed_everything(4)
    restore_rng({**json.loads(text), **load_file(tmp_path / "rng.safetensors")})

    assert [draws() for _ in range(3)] == expected


def test_seed_decides_every_generator() -> None:
    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_states_of_absent_devices_are_left_out() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    rng = capture_rng() | {"cuda.0": torch.zeros(16, dtype=torch.uint8)}
    expected = draws()
    restore_rng(rng)
    assert draws() == expected


@pytest.mark.parametrize(
    ("name", "weights", "compute"),
    [
        ("auto", torch.float32, None),
        ("float32", torch.float32, None),
        ("bf16", torch.float32, torch.bfloat16),
        ("bf16-pure", torch.bfloat16, None),
        ("bf16-stored", torch.bfloat16, None),
    ],
)
def test_precision_on_cpu(name: str, weights: torch.dtype, compute: torch.dtype | None) -> None:
    precision = resolve_precision(name, CPU)
    assert (precision.weights_dtype, precision.compute_dtype) == (weights, compute)
    assert not precision.needs_scaler
    matrix = torch.ones(2, 2, dtype=weights)
    with precision.autocast():
        assert (matrix @ matrix).dtype == (compute or weights)


@pytest.mark.parametrize(
    ("has_bf16", "auto", "needs_scaler"), [(True, "bf16", False), (False, "fp16", True)], ids=["L4", "T4"]
)
def test_precision_on_cuda_follows_the_card(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, auto: str, needs_scaler: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    cuda = torch.device("cuda", 0)
    precision = resolve_precision("auto", cuda)
    assert (precision.name, precision.needs_scaler) == (auto, needs_scaler)
    assert precision.weights_dtype == torch.float32
    if not has_bf16:
        with pytest.raises(MachineError, match=r"Tesla T4 only emulates bf16.*fp16"):
            resolve_precision("bf16-pure", cuda)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: resolve_precision("fp16", CPU), MachineError, r"fp16 on cpu.*use float32 or bf16"),
        (lambda: resolve_precision("fp17", CPU), ConfigError, r"'fp17' is not a precision"),
        (lambda: resolve_device("gpu"), ConfigError, r"'gpu' is not a device"),
        (lambda: resolve_device("mps"), MachineError, r"no mps; it has cpu"),
    ],
)
def test_refused(call: object, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(("has", "expected"), [((), "cpu"), (("mps",), "mps"), (("cuda", "mps"), "cuda")])
def test_auto_takes_the_fastest_device(monkeypatch: pytest.MonkeyPatch, has: tuple[str, ...], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in has)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in has)
    assert resolve_device("auto").type == expected


def test_threads_and_peak_memory() -> None:
    before = set_threads(None)
    assert set_threads(1) == torch.get_num_threads() == 1
    set_threads(before)

    low = peak_memory_bytes(CPU)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    high = peak_memory_bytes(CPU)
    del block
    assert high >= low - 2**20
    assert high > 64 * 2**20
    # A peak does not fall with what is freed. (The kernel counts pages in batches: exact to about 1 MB.)
    assert peak_memory_bytes(CPU) > high - 32 * 2**20
