"""A run's model as a plain Hugging Face folder: what transformers opens, without the training state."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tunelab.errors import ConfigError, did_you_mean
from tunelab.manifest import ADAPTER_CONFIG, TRAINING_STATE, list_checkpoints, verify_checkpoint
from tunelab.runs import RunFolder


@dataclass(frozen=True)
class Exported:
    """What was written: the checkpoint it came from, the files, and their bytes together."""

    checkpoint: str
    folder: Path
    files: tuple[str, ...]
    num_bytes: int


def export_model(
    run: RunFolder, folder: Path, checkpoint: str | None = None, force: bool = False, merge: bool = False
) -> Exported:
    """Copy a checkpoint's model, tokenizer and chat template into `folder`, verified against its manifest first.

    Of a run with an adapter that is the adapter alone. `merge` writes a plain model instead, the adapter added to its
    base's weights in float32 (in bf16 small changes of large weights would be rounded away).

    `checkpoint`: best, last, or a step; default: the best where eval data chose one, else the last. Every file appears
    whole or not at all. `force` writes into a folder that holds files and replaces those of the same names; others
    stay. Raises ConfigError for a checkpoint that does not exist or a folder that is not empty, TunelabError for a
    checkpoint that is damaged.
    """
    source = find_checkpoint(run, checkpoint)
    verify_checkpoint(source)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ConfigError(f"{folder}: is not empty; name a new folder, or write into it with --force")
    if merge and not (source / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{source}: has no adapter to merge, it is a whole model; leave --merge out")
    folder.mkdir(parents=True, exist_ok=True)
    if merge:
        with tempfile.TemporaryDirectory(prefix=".merged-", dir=folder) as merged:
            _write_merged(run, source, Path(merged))
            names = _place(Path(merged), folder)
    else:
        names = _place(source, folder)
    return Exported(source.name, folder, tuple(names), sum((folder / name).stat().st_size for name in names))


def _write_merged(run: RunFolder, checkpoint: Path, folder: Path) -> None:
    from tunelab.config import ModelConfig
    from tunelab.models.loading import load_model
    from tunelab.models.saving import save_model

    trusted = run.recipe().model.trust_remote_code
    config = ModelConfig(name=str(checkpoint), device="cpu", precision="float32", trust_remote_code=trusted)
    save_model(load_model(config), folder)


def _place(source: Path, folder: Path) -> list[str]:
    """Copy the files of a model into `folder`, each whole or not at all, and return their names."""
    names = sorted(path.name for path in source.iterdir() if path.name not in TRAINING_STATE)
    for name in names:
        partial = folder / f".{name}.tmp-{os.getpid()}"
        try:
            shutil.copyfile(source / name, partial)
            partial.replace(folder / name)
        finally:
            partial.unlink(missing_ok=True)
    return names


def find_checkpoint(run: RunFolder, checkpoint: str | None) -> Path:
    """The folder of a run's checkpoint by `best`, `last` or step. Raises ConfigError naming those there are."""
    steps = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(run.checkpoints)}
    if not steps:
        raise ConfigError(f"{run.path}: has no checkpoint yet; continue it with --resume")
    best = run.path / "best"
    if checkpoint is None:
        checkpoint = "best" if best.is_dir() else "last"
    if checkpoint == "best":
        if not best.is_dir():
            raise ConfigError(f"{run.path}: has no best checkpoint (no eval data chose one); use --checkpoint last")
        return best.resolve()
    if checkpoint == "last":
        return steps[max(steps)]
    if checkpoint.isdigit() and int(checkpoint) in steps:
        return steps[int(checkpoint)]
    known = ["best", "last", *map(str, steps)]
    raise ConfigError(f"--checkpoint: '{checkpoint}' is not one of {', '.join(known)}{did_you_mean(checkpoint, known)}")
