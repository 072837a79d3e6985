"""Checkpoints: bit-exact round trip, refusal of damage, atomic writing, pruning."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
import torch

from tests.training.conftest import build_tiny
from tunelab.config import AdamWConfig, SGDConfig
from tunelab.errors import MachineError
from tunelab.manifest import CorruptCheckpoint, list_checkpoints, verify_checkpoint
from tunelab.optim import build_optimizer
from tunelab.training import checkpoint as room
from tunelab.training.checkpoint import (
    latest_valid_checkpoint,
    point_best,
    prune_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from tunelab.training.state import TrainState

OPTIMIZERS = [AdamWConfig(weight_decay=0.1), SGDConfig(), SGDConfig(momentum=0.9)]


def make_state(optimizer: AdamWConfig | SGDConfig = OPTIMIZERS[0], steps: int = 3) -> TrainState:
    loaded = build_tiny()
    state = TrainState(loaded, build_optimizer(loaded.model.named_parameters(), optimizer, "cpu"), None)
    for _ in range(steps):
        advance(state)
    return state


def advance(state: TrainState) -> None:
    """A step with random gradients: the generators are part of what must be restored."""
    for parameter in state.loaded.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.counters.step += 1
    state.counters.add_seconds("training", 0.25)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "sgd", "momentum"])
def test_a_restored_state_goes_on_bit_for_bit(tmp_path: Path, optimizer: AdamWConfig | SGDConfig) -> None:
    state = make_state(optimizer)
    path = save_checkpoint(tmp_path, state, {"recipe": "abc"})
    for _ in range(3):
        advance(state)

    from safetensors.torch import load_model

    other = build_tiny(seed=99)
    load_model(other.model, path / "model.safetensors", strict=False)
    restored = TrainState(other, build_optimizer(other.model.named_parameters(), optimizer, "cpu"), None)
    torch.manual_seed(12345)
    restore_checkpoint(path, restored)
    assert restored.counters.seconds == {"training": 0.75}
    for _ in range(3):
        advance(restored)
    assert restored.step == state.step == 6
    for (name, one), two in zip(state.loaded.model.named_parameters(), restored.loaded.model.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
def test_one_flipped_bit_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, make_state(), {})
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=f"{name}: its sha256"):
        verify_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "rng.safetensors", "optimizer.json", "manifest.json"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, make_state(), {})
    (path / name).unlink()
    with pytest.raises(CorruptCheckpoint, match=name):
        verify_checkpoint(path)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path) -> None:
    state = make_state()
    older = save_checkpoint(tmp_path, state, {})
    advance(state)
    newer = save_checkpoint(tmp_path, state, {})
    with (newer / "optimizer.safetensors").open("r+b") as file:
        file.truncate(100)
    said: list[str] = []
    assert latest_valid_checkpoint(tmp_path, said.append) == older
    assert len(said) == 1
    assert "optimizer.safetensors: has another size" in said[0]
    # The damaged step is trained again, and what is saved then is whole.
    verify_checkpoint(save_checkpoint(tmp_path, state, {}))


def test_a_step_is_saved_again_once_its_evaluation_was_made(tmp_path: Path) -> None:
    """A stop during an evaluation saves the step without it; the resumed session makes it and must not lose it."""
    state = make_state()
    save_checkpoint(tmp_path, state, {})
    state.evaluation.last_step = state.step
    state.evaluation.note(state.step, loss=1.5, threshold=0.0)
    path = save_checkpoint(tmp_path, state, {})
    verify_checkpoint(path)
    assert room.read_numbers(path)["evaluation"]["best_loss"] == 1.5
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]


@pytest.mark.parametrize("moment", ["save_model", "save_file", "write_manifest", "_fsync"])
def test_a_kill_at_any_moment_of_saving_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    state = make_state()
    older = save_checkpoint(tmp_path, state, {})
    advance(state)

    class Killed(BaseException):
        """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""

    def die(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(room, moment, die)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, state, {})
    assert list_checkpoints(tmp_path) == [older]
    assert latest_valid_checkpoint(tmp_path, print) == older
    newer = save_checkpoint(tmp_path, state, {})
    verify_checkpoint(newer)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("tmp-")] == []


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path: Path) -> None:
    """A real one: files may not grow beyond 64 kB, and safetensors says so in its own words."""
    state = make_state()
    older = save_checkpoint(tmp_path, state, {})
    advance(state)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(MachineError, match=r"could not be written \(.*\); free some disk space and resume"):
            save_checkpoint(tmp_path, state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == [older]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    state = make_state(steps=0)
    paths = []
    for _ in range(5):
        advance(state)
        paths.append(save_checkpoint(tmp_path, state, {}))
    prune_checkpoints(tmp_path, keep=2, newest=paths[4], protected=paths[1])
    assert list_checkpoints(tmp_path) == [paths[1], paths[3], paths[4]]


def test_nothing_is_pruned_when_the_newest_is_damaged(tmp_path: Path) -> None:
    state = make_state(steps=0)
    paths = []
    for _ in range(3):
        advance(state)
        paths.append(save_checkpoint(tmp_path, state, {}))
    (paths[2] / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptCheckpoint):
        prune_checkpoints(tmp_path, keep=1, newest=paths[2], protected=None)
    assert list_checkpoints(tmp_path) == paths


def test_best_is_a_relative_link_that_can_be_moved_with_its_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "checkpoints" / "step-000002").mkdir()
    point_best(run / "best", run / "checkpoints" / "step-000001")
    point_best(run / "best", run / "checkpoints" / "step-000002")
    run.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "best").resolve().name == "step-000002"


def test_no_pickle_is_written(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_state(), {})
    assert {p.suffix for p in path.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {p.name for p in path.iterdir()} - {"manifest.json"}
