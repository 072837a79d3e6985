"""Held-out loss under the objective trained with, and per-record scores for intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tunelab.data import Dataset, pack_batches
from tunelab.models.engine import compute_logprobs, sequence_logprobs
from tunelab.models.loaded import LoadedModel
from tunelab.objectives import Objective
from tunelab.types import Metrics


def evaluate_objective(
    loaded: LoadedModel,
    objective: Objective,
    dataset: Dataset,
    indices: Sequence[int] | np.ndarray,
    reference: np.ndarray | None,
    *,
    batch_size: int,
    on_records: Callable[[int], None] = lambda count: None,
) -> Metrics:
    """`loss` and the objective's own metrics over the given records, averaged by the objective's weight.

    reference: (N, 2) of the whole data set, where the objective needs one. Dropout is off; the mode is restored.
    """
    totals: dict[str, torch.Tensor] = {}
    weight = torch.zeros((), device=loaded.device)
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.no_grad():
            for batch in pack_batches(dataset.examples, indices, batch_size):
                batch = batch.to(loaded.device)
                rows = None
                if reference is not None:
                    rows = torch.from_numpy(reference[list(batch.record_ids)]).to(loaded.device)
                loss, sums = objective.loss_sum(compute_logprobs(loaded, batch), batch, rows)
                weight = weight + objective.weight(batch)
                for name, value in {"loss": loss, **sums}.items():
                    totals[name] = totals[name] + value if name in totals else value
                on_records(len(batch.record_ids))
    finally:
        loaded.model.train(was_training)
    return {name: float(total / weight) for name, total in totals.items()}


@dataclass(frozen=True)
class RecordScores:
    """Per record of a data set: summed log-probability and number of loss tokens of each completion.

    logprobs: (N, K) float64; counts: (N, K) int64; K = 1 for supervised data, 2 (chosen, rejected) for pairs.
    """

    logprobs: np.ndarray
    counts: np.ndarray


def score_records(
    loaded: LoadedModel,
    dataset: Dataset,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    on_records: Callable[[int], None] = lambda count: None,
) -> RecordScores:
    """Scores of the given records, in their order."""
    sums, counts = sequence_logprobs(
        loaded, pack_batches(dataset.examples, indices, batch_size), lambda batch: on_records(len(batch.record_ids))
    )
    width = len(dataset.examples[int(indices[0])].completions)
    return RecordScores(sums.reshape(-1, width), counts.reshape(-1, width))
