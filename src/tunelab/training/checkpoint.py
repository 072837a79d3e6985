"""Checkpoints that survive a kill at any moment, refuse a flipped bit, and contain no pickle.

    checkpoints/step-000200/
        model.safetensors, config.json, tokenizer files     opens in transformers as it stands
        (or adapter_model.safetensors, adapter_config.json  opens in peft, on its base model)
        optimizer.safetensors, optimizer.json               state tensors by parameter number; groups
        rng.safetensors, state.json                         generators; counters, fingerprints, environment
        manifest.json                                       sha256 and size of every file above, written last

Save: write `tmp-…/`, fsync the files, manifest, fsync, rename, fsync the parent. Load: verify all, else say so and take
the one before. Prune only after the new one verified.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunelab.errors import MachineError
from tunelab.manifest import CorruptCheckpoint, checkpoint_name, list_checkpoints, verify_checkpoint, write_manifest
from tunelab.models.saving import save_model
from tunelab.optim.saving import pack_state, unpack_state
from tunelab.parallel import capture_rng, restore_rng
from tunelab.training.state import TrainState


def save_checkpoint(folder: Path, state: TrainState, fingerprints: Mapping[str, Any]) -> Path:
    """Write `state` under `folder` atomically and return its path; one that already holds this very state is kept.

    (The loop saves where it stops, and a hook may just have done so.) `fingerprints`: what the run was made with.
    Raises MachineError if the disk is full; the checkpoints before stay as they are.
    """
    final = folder / checkpoint_name(state.step)
    if final.exists() and _holds(final, state):
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
        write_manifest(temporary)
        for path in temporary.iterdir():
            _fsync(path)
        _fsync(temporary)
        if final.exists():  # the same step with another evaluation state; see `_holds`
            _set_aside(final)
        temporary.rename(final)
        _fsync(folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise MachineError(
            f"{final}: the checkpoint could not be written ({reason}); free some disk space and resume: earlier "
            "checkpoints are untouched"
        ) from error
    return final


def _holds(path: Path, state: TrainState) -> bool:
    """Whether a checkpoint of the same step also has the same evaluations behind it.

    A run stopped during an evaluation saves a step whose evaluation is still to come; the next session makes it, and
    its outcome (best, patience) must replace the older state of that step.
    """
    numbers = read_numbers(path)
    own = state.numbers()
    return bool(numbers["evaluation"] == own["evaluation"] and numbers["stop_early"] == own["stop_early"])


def _set_aside(path: Path) -> None:
    """Take a folder out of the list of checkpoints at once, whatever happens to its removal."""
    doomed = path.with_name(f"tmp-removed-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def latest_valid_checkpoint(folder: Path, notify: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all as written. Each refused one is named aloud and renamed `damaged-…`:
    its step will be trained and saved again.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
            return path
        except CorruptCheckpoint as error:
            aside = path.with_name(f"damaged-{path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
            notify(f"refused a damaged checkpoint: {error}; kept as {aside.name}, trying the one before")
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
        _set_aside(path)


def _save_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    tensors, described = pack_state(optimizer)
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(described))


def _load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """The hyperparameters are the recipe's (changed ones were accepted as drift); only the state is restored."""
    described = json.loads((folder / "optimizer.json").read_text())
    unpack_state(optimizer, load_file(folder / "optimizer.safetensors"), described)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
