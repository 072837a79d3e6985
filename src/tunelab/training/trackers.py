"""Optional experiment trackers. The run folder is the truth; these are mirrors of metrics.jsonl, each a pip extra."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tunelab.errors import MachineError


class Tracker(Protocol):
    """A place metrics are mirrored to."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def build_trackers(names: Sequence[str], project: str, run: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """The recipe's trackers. Raises MachineError naming the extra to install."""
    check_trackers(names)
    return [TRACKERS[name](_load(name), project, run, config) for name in names]


def _load(name: str) -> Any:
    try:
        return importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
    except ImportError as error:
        raise MachineError(
            f"tracking.trackers: {name} is installed but does not import ({error}); install it anew, or remove it"
        ) from None


def check_trackers(names: Sequence[str]) -> None:
    """Raise MachineError for a tracker that is not installed, without importing any."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: only a folder of that name (wandb/ of an earlier run)
            raise MachineError(
                f"tracking.trackers: {name} is not installed; pip install 'tunelab[{name}]' or remove it from the list"
            )


class WandbTracker:
    """Weights & Biases, offline unless WANDB_MODE says otherwise; files go into the run folder."""

    def __init__(self, wandb: Any, project: str, run: Path, config: Mapping[str, Any]) -> None:
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=project, name=run.name, id=run.name, resume="allow", dir=str(run), config=dict(config), mode=mode
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorboardTracker:
    """Event files under runs/NAME/tensorboard."""

    def __init__(self, tensorboard: Any, project: str, run: Path, config: Mapping[str, Any]) -> None:
        self._writer = tensorboard.SummaryWriter(str(run / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class TrackioTracker:
    """trackio, local."""

    def __init__(self, trackio: Any, project: str, run: Path, config: Mapping[str, Any]) -> None:
        self._trackio = trackio
        trackio.init(project=project, name=run.name, config=dict(config), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


class MlflowTracker:
    """MLflow; a SQLite file beside the run folders unless MLFLOW_TRACKING_URI says otherwise."""

    def __init__(self, mlflow: Any, project: str, run: Path, config: Mapping[str, Any]) -> None:
        self._mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:  # MLflow's own default, a folder of files, is in maintenance mode
            mlflow.set_tracking_uri(f"sqlite:///{run.parent.resolve() / 'mlflow.db'}")
        mlflow.set_experiment(project)
        mlflow.start_run(run_name=run.name)
        mlflow.log_dict(dict(config), "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({name: float(value) for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[Any, str, Path, Mapping[str, Any]], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorboardTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}
