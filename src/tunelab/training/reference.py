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
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tunelab.cache import cache_folder
from tunelab.data import Dataset, pack
from tunelab.models.adapters import adapter_disabled
from tunelab.models.engine import sequence_logprobs
from tunelab.models.loaded import LoadedModel
from tunelab.models.portions import OnHalved, in_portions
from tunelab.models.saving import adapter_fingerprint, weights_fingerprint
from tunelab.parallel import device_name
from tunelab.progress import Progress
from tunelab.training.loop import StopRequested
from tunelab.training.signals import StopSignal

BATCH_SIZE = 8


def reference_logprobs(
    loaded: LoadedModel,
    wanted: Sequence[tuple[Dataset, np.ndarray]],
    progress: Progress,
    stop: StopSignal,
    on_halved: OnHalved = lambda size: None,
    with_adapter: bool = False,
) -> list[np.ndarray]:
    """Summed log-probabilities of (chosen, rejected) under `loaded`, for each (data set, record indices) wanted.

    An adapter is switched off: what lies below it is the reference, and neither the values nor the cache depend on it.
    `with_adapter`: not that of a reference which is a model of its own.
    Returns one (P, 2) float32 array a data set, NaN in the rows of records that were not asked for: a NaN that is used
    after all stops the run at its guard. Read from `$TUNELAB_CACHE/reference` where present. A batch that does not fit
    in memory is halved, as are those after it, and `on_halved` told. Raises StopRequested if a stop was asked for.
    """
    weights = weights_fingerprint(loaded.model) + loaded.model.config.to_json_string()
    if with_adapter:
        weights += adapter_fingerprint(loaded)
    with nullcontext() if with_adapter else adapter_disabled(loaded):
        return [_one(loaded, weights, dataset, indices, progress, stop, on_halved) for dataset, indices in wanted]


def _one(
    loaded: LoadedModel,
    weights: str,
    dataset: Dataset,
    indices: np.ndarray,
    progress: Progress,
    stop: StopSignal,
    on_halved: OnHalved,
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

    def score(part: list[int]) -> np.ndarray:
        return sequence_logprobs(loaded, [pack([dataset.examples[index] for index in part], part)])[0]

    sums = []
    for found in in_portions(ids, BATCH_SIZE, score, what="the reference's pass", on_halved=on_halved):
        sums.append(found)
        progress.advance(task, len(found) // 2)
        if stop():
            raise StopRequested
    progress.finish(task)
    values = np.concatenate(sums).reshape(-1, 2).astype(np.float32)
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
