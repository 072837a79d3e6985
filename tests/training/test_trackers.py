"""Trackers mirror metrics.jsonl: the right calls on the right library, and a clear word where it is missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tunelab.errors import EXIT_ENVIRONMENT, MachineError
from tunelab.training.trackers import TRACKERS, Tracker, build_trackers, check_trackers

CONFIG = {"model": {"name": "tiny-gpt2"}, "training": {"seed": 0}}
Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class Recorder(ModuleType):
    """A module whose every function notes its call, and returns the module: `init()` gives something to log to."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin="fake")  # what a search for an installed package finds
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **keywords: Any) -> Recorder:
            self.calls.append((name, arguments, keywords))
            return self

        return call


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "runs" / "my-run"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(name: str) -> Recorder:
        module = Recorder(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def use(name: str, run: Path) -> Tracker:
    (tracker,) = build_trackers([name], "my-project", run, CONFIG)
    return tracker


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_missing_tracker_names_its_extra(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MachineError, match=rf"tracking\.trackers: {name} is not installed") as caught:
        use(name, run)
    assert f"pip install 'tunelab[{name}]'" in str(caught.value)
    assert caught.value.exit_code == EXIT_ENVIRONMENT == 4
    assert "\n" not in str(caught.value)


def test_every_tracker_has_an_extra_of_its_name() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(TRACKERS) <= set(project["optional-dependencies"])


def test_none_asked_for_imports_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "trackio", "mlflow", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert build_trackers((), "my-project", run, CONFIG) == []


def test_wandb_is_offline_unless_told_otherwise(run: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = fake("wandb")
    use("wandb", run)
    name, _, keywords = wandb.calls[0]
    assert name == "init"
    assert keywords["mode"] == "offline"
    assert keywords["project"] == "my-project"
    assert keywords["name"] == keywords["id"] == "my-run"
    assert keywords["resume"] == "allow", "a resumed run goes on in the same curves"
    assert keywords["dir"] == str(run)
    assert keywords["config"] == CONFIG
    monkeypatch.setenv("WANDB_MODE", "online")
    use("wandb", run)
    assert wandb.calls[1][2]["mode"] == "online"


def test_wandb_gets_steps_and_is_finished(run: Path, fake: Any) -> None:
    wandb = fake("wandb")
    tracker = use("wandb", run)
    tracker.log(3, {"train/loss": 2.5})
    tracker.close()
    assert wandb.calls[1:] == [("log", ({"train/loss": 2.5},), {"step": 3}), ("finish", (), {})]


def test_trackio(run: Path, fake: Any) -> None:
    trackio = fake("trackio")
    tracker = use("trackio", run)
    tracker.log(3, {"train/loss": 2.5})
    tracker.close()
    init, *rest = trackio.calls
    assert init == ("init", (), {"project": "my-project", "name": "my-run", "config": CONFIG, "resume": "allow"})
    assert rest == [("log", ({"train/loss": 2.5},), {"step": 3}), ("finish", (), {})]


def test_mlflow_writes_beside_the_runs_unless_told_otherwise(
    run: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = fake("mlflow")
    tracker = use("mlflow", run)
    tracker.log(3, {"train/loss": 2.5, "samples": 7})
    tracker.close()
    assert mlflow.calls == [
        ("set_tracking_uri", (f"sqlite:///{run.parent / 'mlflow.db'}",), {}),
        ("set_experiment", ("my-project",), {}),
        ("start_run", (), {"run_name": "my-run"}),
        ("log_dict", (CONFIG, "config.json"), {}),
        ("log_metrics", ({"train/loss": 2.5, "samples": 7.0},), {"step": 3}),
        ("end_run", (), {}),
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    mlflow.calls.clear()
    use("mlflow", run)
    assert "set_tracking_uri" not in [name for name, _, _ in mlflow.calls]


def test_tensorboard_calls(run: Path, fake: Any) -> None:
    fake("tensorboard")
    tensorboard = fake("torch.utils.tensorboard")  # torch's writer, which needs the package
    tracker = use("tensorboard", run)
    tracker.log(3, {"train/loss": 2.5, "grad_norm": 0.5})
    tracker.close()
    assert tensorboard.calls == [
        ("SummaryWriter", (str(run / "tensorboard"),), {}),
        ("add_scalar", ("train/loss", 2.5, 3), {}),
        ("add_scalar", ("grad_norm", 0.5, 3), {}),
        ("close", (), {}),
    ]


def test_tensorboard_itself_writes_an_event_file(run: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = use("tensorboard", run)
    tracker.log(3, {"train/loss": 2.5})
    tracker.close()
    events = list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("train/loss")] == [(3, 2.5)]


def test_several_trackers_in_the_order_asked_for(run: Path, fake: Any) -> None:
    fake("wandb")
    fake("trackio")
    built = build_trackers(["trackio", "wandb"], "my-project", run, CONFIG)
    assert [type(tracker).__name__ for tracker in built] == ["TrackioTracker", "WandbTracker"]


def test_a_folder_of_a_trackers_name_is_not_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb/` beside the runs, as an earlier run leaves it, imports as an empty namespace package."""
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("the real wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(MachineError, match=r"wandb is not installed; pip install 'tunelab\[wandb\]'"):
        check_trackers(["wandb"])
