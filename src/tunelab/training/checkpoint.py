"""Checkpoints that survive a kill at any moment, refuse a flipped bit, and contain no pickle.

    checkpoints/step-000200/
        model.safetensors, config.json, tokenizer files     opens in transformers as it stands
        optimizer.safetensors, optimizer.json               state tensors by parameter number; groups
        rng.safetensors, state.json                         generators; counters, fingerprints, environment
        manifest.json                                       sha256 and size of every file above, written last

Save: write `tmp-…/`, fsync the files, manifest, fsync, rename, fsync the parent. Load: verify all, else say so and take
the one before. Prune only after the new one verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunelab.errors import MachineError, TunelabError
from tunelab.models.saving import save_model
from tunelab.parallel import capture_rng, restore_rng
from tunelab.training.state import TrainState

MANIFEST = "manifest.json"


class CorruptCheckpoint(TunelabError):  # noqa: N818
    """A checkpoint whose files are missing, short or changed since they were written."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first. Temporary folders of a killed save are not among them."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def save_checkpoint(folder: Path, state: TrainState, fingerprints: Mapping[str, Any]) -> Path:
    """Write `state` under `folder` atomically and return its path; a finished one of the same step is left alone.

    `fingerprints`: whatever must be the same when the run resumes. Raises MachineError if the disk is full; the
    checkpoints before stay as they are.
    """
    final = folder / checkpoint_name(state.step)
    if (final / MANIFEST).exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("tmp-*"):
        shutil.rmtree(stale)
    temporary = folder / f"tmp-{final.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        save_model(state.loaded, temporary)
        _save_optimizer(temporary, state.optimizer)
        rng = capture_rng()
        save_file({k: v for k, v in rng.items() if isinstance(v, Tensor)}, temporary / "rng.safetensors")
        numbers = {
            **state.numbers(),
            "rng": {k: v for k, v in rng.items() if not isinstance(v, Tensor)},
            "fingerprints": dict(fingerprints),
        }
        (temporary / "state.json").write_text(json.dumps(numbers, indent=1))
        manifest = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"schema_version": 1, "files": manifest}, indent=1))
        for path in temporary.iterdir():
            _fsync(path)
        _fsync(temporary)
        if final.exists():  # an unfinished folder of this name: no manifest
            shutil.rmtree(final)
        temporary.rename(final)
        _fsync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise MachineError(
            f"{final}: the checkpoint could not be written ({error.strerror or error}); free some disk space and "
            "resume: earlier checkpoints are untouched"
        ) from error
    return final


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest. Raises CorruptCheckpoint naming the first file that differs."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        raise CorruptCheckpoint(f"{path}: {MANIFEST} is missing or unreadable") from None
    for name, expected in files.items():
        if not (path / name).is_file():
            raise CorruptCheckpoint(f"{path / name}: missing")
        if (path / name).stat().st_size != expected["bytes"]:
            raise CorruptCheckpoint(f"{path / name}: has another size than when it was written")
        if _digest(path / name) != expected:
            raise CorruptCheckpoint(f"{path / name}: its sha256 is not the one it was written with")


def latest_valid_checkpoint(folder: Path, notify: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all as written; each refused one is named aloud."""
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
            return path
        except CorruptCheckpoint as error:
            notify(f"refused a damaged checkpoint: {error}; trying the one before")
    return None


def read_numbers(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    numbers: dict[str, Any] = json.loads((path / "state.json").read_text())
    return numbers


def restore_checkpoint(path: Path, state: TrainState) -> None:
    """Load optimizer, counters and random generators of `path` into `state`, bit for bit.

    The weights are already in `state.loaded`: a checkpoint is a model folder, and was loaded as one.
    """
    _load_optimizer(path, state.optimizer)
    numbers = read_numbers(path)
    state.load_numbers(numbers)
    restore_rng({**numbers["rng"], **load_file(path / "rng.safetensors")})


def point_best(link: Path, checkpoint: Path) -> None:
    """Make `link` a relative symbolic link to `checkpoint`, replacing an older one atomically."""
    temporary = link.with_name(f".{link.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(checkpoint, link.parent), target_is_directory=True)
    temporary.replace(link)


def prune_checkpoints(folder: Path, keep: int, newest: Path, protected: Path | None) -> None:
    """Remove all but the `keep` newest checkpoints and `protected` (the best), once `newest` is known to be good."""
    surplus = [p for p in list_checkpoints(folder)[:-keep] if p not in (newest, protected)]
    if not surplus:
        return
    verify_checkpoint(newest)
    for path in surplus:
        # Renamed first: a kill midway must not leave a half-deleted folder that looks like a checkpoint.
        doomed = path.with_name(f"tmp-pruned-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _save_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for number, entries in packed["state"].items():
        for name, value in entries.items():
            target = tensors if isinstance(value, Tensor) else scalars
            target[f"{number}.{name}"] = value.contiguous() if isinstance(value, Tensor) else value
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps({"groups": packed["param_groups"], "scalars": scalars}))


def _load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    described = json.loads((folder / "optimizer.json").read_text())
    entries = {**load_file(folder / "optimizer.safetensors"), **described["scalars"]}
    packed: dict[int, dict[str, Any]] = {}
    for key, value in entries.items():
        number, name = key.split(".", 1)
        packed.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": packed, "param_groups": described["groups"]})


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
