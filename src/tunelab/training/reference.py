"""Reference log-probabilities: once per model and data set, cached on disk.

The reference of DPO and its kin never changes during a run, so its forward passes are paid once and its weights need
not stay in memory. The cache key covers weights and configuration of the model, the token ids and masks of the records
(which contain tokenizer, rendering and truncation), precision, layout, shortcuts, device and torch version: all that
its bits depend on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tunelab.cache import cache_folder
from tunelab.data import Dataset, pack_batches
from tunelab.models.adapters import adapter_disabled
from tunelab.models.engine import sequence_logprobs
from tunelab.models.loaded import LoadedModel
from tunelab.models.saving import weights_fingerprint
from tunelab.parallel import device_name
from tunelab.progress import Progress
from tunelab.training.loop import StopRequested
from tunelab.training.signals import StopSignal
from tunelab.types import Batch

BATCH_SIZE = 8


def reference_logprobs(
    loaded: LoadedModel,
    wanted: Sequence[tuple[Dataset, np.ndarray]],
    progress: Progress,
    stop: StopSignal,
) -> list[np.ndarray]:
    """Summed log-probabilities of (chosen, rejected) under `loaded`, for each (data set, record indices) wanted.

    An adapter is switched off: what lies below it is the reference, and neither the values nor the cache depend on it.
    Returns one (P, 2) float32 array a data set, NaN in the rows of records that were not asked for: a NaN that is used
    after all stops the run at its guard. Read from `$TUNELAB_CACHE/reference` where present. Raises StopRequested if a
    stop was asked for midway.
    """
    weights = weights_fingerprint(loaded.model) + loaded.model.config.to_json_string()
    with adapter_disabled(loaded):
        return [_one(loaded, weights, dataset, indices, progress, stop) for dataset, indices in wanted]


def _one(
    loaded: LoadedModel, weights: str, dataset: Dataset, indices: np.ndarray, progress: Progress, stop: StopSignal
) -> np.ndarray:
    ids = [int(index) for index in indices]
    parts = (
        weights,
        dataset.fingerprint,
        str(ids),
        loaded.precision.name,
        loaded.layout,
        str(loaded.shortcuts),
        device_name(loaded.device),
        torch.__version__,
    )
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    path = cache_folder() / "reference" / f"{key[:32]}.safetensors"
    every = np.full((len(dataset), 2), np.nan, dtype=np.float32)
    cached = _read(path, len(ids))
    if cached is not None:
        progress.note(f"reference log-probabilities: {len(ids)} pairs from the cache")
        every[ids] = cached
        return every
    task = "reference"
    progress.start(task, len(ids))

    def on_batch(batch: Batch) -> None:
        progress.advance(task, len(batch.record_ids))
        if stop():
            raise StopRequested

    batches = pack_batches(dataset.examples, ids, BATCH_SIZE)
    sums, _ = sequence_logprobs(loaded, batches, on_batch)
    progress.finish(task)
    values = sums.reshape(-1, 2).astype(np.float32)
    every[ids] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    save_file({"logprobs": values}, temporary)
    temporary.replace(path)
    return every


def _read(path: Path, num_pairs: int) -> np.ndarray | None:
    """A cached array, or None where there is none or it is not one of ours (it is then computed and written again)."""
    if not path.is_file():
        return None
    try:
        values: np.ndarray = load_file(path)["logprobs"]
    except (SafetensorError, KeyError):
        return None
    return values if values.shape == (num_pairs, 2) else None
