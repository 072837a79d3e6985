"""One function from a batch to log-probabilities, whatever the layout; and scoring without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tunelab.errors import ConfigError
from tunelab.models.attention import plain_attention
from tunelab.models.loaded import LoadedModel
from tunelab.models.packed import enable_fused_blocks, enable_packing, packed_logprobs
from tunelab.models.padded import padded_logprobs
from tunelab.models.shortcuts import Shortcuts
from tunelab.types import Batch


def choose_layout(
    loaded: LoadedModel,
    layout: Literal["auto", "packed", "padded"],
    longest: int,
    kernels: Literal["auto", "plain"] = "auto",
) -> None:
    """Set `loaded.layout` and `loaded.shortcuts`, and why. `auto` takes the packed layout where the model computes the
    same in it, for sequences of up to `longest` tokens, and fused blocks where they compute the same as its own.

    An adapter must be attached before. Raises ConfigError if `packed` is asked for and the model cannot.
    """
    if layout == "padded":
        loaded.layout, loaded.layout_reason = "padded", "asked for by model.layout"
        return
    reason = enable_packing(loaded.model, longest)
    if reason is None:
        loaded.layout, loaded.layout_reason = "packed", "verified against the plain model"
        _choose_blocks(loaded, kernels)
    elif layout == "packed":
        raise ConfigError(f"model.layout: this model cannot take packed rows ({reason}); set it to auto or padded")
    else:
        loaded.layout, loaded.layout_reason = "padded", reason


def _choose_blocks(loaded: LoadedModel, kernels: Literal["auto", "plain"]) -> None:
    reason = "asked for by model.kernels" if kernels == "plain" else enable_fused_blocks(loaded.model)
    loaded.shortcuts = Shortcuts(fused_blocks=reason is None)
    loaded.blocks_reason = reason or "verified against the plain model"


def compute_logprobs(loaded: LoadedModel, batch: Batch, *, summed: bool = False) -> Tensor:
    """log p(target) at every loss position of `batch`: (S,) float32, differentiable, under the run's precision.

    summed: the loss is a multiple of their sum (see `token_logprobs`).
    """
    with loaded.precision.autocast():
        if loaded.layout == "packed":
            return packed_logprobs(loaded.model, batch, summed=summed, shortcuts=loaded.shortcuts)
        with plain_attention(loaded.model):
            return padded_logprobs(loaded.model, batch)


def sequence_logprobs(
    loaded: LoadedModel, batches: Iterable[Batch], on_batch: Callable[[Batch], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probability and number of loss tokens of every completion, in batch order, without gradients.

    Returns ((B,) float64, (B,) int64). Dropout is off while scoring; the model's mode is restored.
    """
    sums: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                on_device = batch.to(loaded.device)
                logprobs = compute_logprobs(loaded, on_device).double().cpu().numpy()
                owners = batch.sequence_ids.numpy()
                sums.append(np.bincount(owners, weights=logprobs, minlength=batch.num_sequences))
                counts.append(np.bincount(owners, minlength=batch.num_sequences))
                if on_batch is not None:
                    on_batch(batch)
    finally:
        loaded.model.train(was_training)
    if not sums:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    return np.concatenate(sums), np.concatenate(counts)
