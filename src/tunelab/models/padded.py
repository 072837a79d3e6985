"""The padded layout: every sequence a row of its own, through the model's own forward and its full logits.

The fallback for models whose attention cannot take packed rows. Chosen by trial (`packed.enable_packing`) or by
`model.layout`, and always reported.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunelab.types import Batch


def padded_logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log p(target) at every loss position: (S,) float32, differentiable. The same numbers as `packed_logprobs`.

    Padding is on the right, so causal attention alone keeps it from every real token; the mask is passed all the same.
    """
    rows = _rows(batch)
    width = max(len(row) for row in rows)
    index = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        index[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    device = batch.input_ids.device
    index, mask = index.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=batch.input_ids[index], attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    sequences, columns = _predictors(batch, rows)
    chosen = logits[sequences.to(device), columns.to(device)].float()
    return torch.log_softmax(chosen, dim=-1).gather(1, batch.targets[:, None]).squeeze(1)


def _rows(batch: Batch) -> list[list[int]]:
    """Packed indices of each sequence, prefix first, in sequence order.

    A segment that others use as their prefix is a shared prompt, no sequence of its own.
    """
    prompts = {(s.prefix_start, s.prefix_stop) for s in batch.segments if s.prefix_length}
    return [
        [*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop)]
        for s in batch.segments
        if (s.start, s.stop) not in prompts
    ]


def _predictors(batch: Batch, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(S,) row and (S,) column of the hidden state that predicts each target."""
    columns = [{packed: column for column, packed in enumerate(row)} for row in rows]
    sequences = batch.sequence_ids.tolist()
    found = [
        columns[sequence][position] for sequence, position in zip(sequences, batch.loss_positions.tolist(), strict=True)
    ]
    return torch.tensor(sequences), torch.tensor(found)
