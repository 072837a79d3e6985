"""One optimizer step over any number of micro-batches.

The only place in the project that divides a loss: by the objective's weight (valid tokens, or pairs) summed over all
micro-batches of the step. So 8 micro-batches of 1, 4 of 2 and 1 of 8 give the same update to rounding, whatever the
lengths (a mean per micro-batch, then a mean of means, does not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunelab.errors import DivergedError
from tunelab.models.engine import compute_logprobs
from tunelab.objectives import Objective
from tunelab.training.state import TrainState
from tunelab.types import Batch, Metrics

MIN_LOSS_SCALE = 1.0
"""An fp16 scale below this means that gradients overflow whatever the scale: the run has diverged."""


@dataclass(frozen=True)
class MicroBatch:
    """A packed row and, for preference objectives with a reference, its (P, 2) reference log-probabilities."""

    batch: Batch
    reference: Tensor | None = None


def train_step(
    state: TrainState,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    *,
    learning_rate: float,
    max_grad_norm: float | None,
) -> Metrics:
    """Forward, backward and one update of `state`; returns the step's metrics, averaged over its weight.

    Raises DivergedError, before any weight changes, if the loss or a gradient is not finite. With an fp16 scaler an
    overflowing step is skipped and the scale lowered, as usual, until the scale itself says the run has diverged.
    """
    loaded, optimizer, scaler = state.loaded, state.optimizer, state.scaler
    loaded.model.train()
    moved = [MicroBatch(m.batch.to(loaded.device), _to(m.reference, loaded.device)) for m in micro_batches]
    weight = torch.stack([objective.weight(m.batch) for m in moved]).sum()
    totals: dict[str, Tensor] = {}
    for micro in moved:
        logprobs = compute_logprobs(loaded, micro.batch, summed=objective.sums_logprobs)
        loss_sum, sums = objective.loss_sum(logprobs, micro.batch, micro.reference)
        loss = loss_sum / weight
        (scaler.scale(loss) if scaler is not None else loss).backward()
        for name, value in {"train/loss": loss_sum.detach(), **sums}.items():
            totals[name] = totals[name] + value if name in totals else value

    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])

    # One reading of the device for everything a person sees, and for the guard.
    names = [*totals, "grad_norm"]
    values = torch.stack([*(total / weight for total in totals.values()), grad_norm]).tolist()
    metrics = dict(zip(names, values, strict=True)) | {"learning_rate": learning_rate}
    _guard(state, metrics)
    # As the norm is known here, gradients within the limit are not read and written again to be scaled by one.
    if max_grad_norm is not None and metrics["grad_norm"] > max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)

    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if scaler is not None:
        scaler.step(optimizer)  # skips the update itself when unscale_ found an overflow
        scaler.update()
        metrics["loss_scale"] = float(scaler.get_scale())
        if not _finite(metrics["grad_norm"]):
            del metrics["grad_norm"]  # JSON has no infinity, and a skipped step has no norm worth drawing
            metrics["overflow"] = 1.0
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def _guard(state: TrainState, metrics: Metrics) -> None:
    """Refuse a step that would write NaN into the weights."""
    loss, grad_norm = metrics["train/loss"], metrics["grad_norm"]
    bad = "loss" if not _finite(loss) else "gradient norm" if not _finite(grad_norm) else None
    if bad is None:
        return
    scaler = state.scaler
    if bad == "gradient norm" and scaler is not None and scaler.get_scale() > MIN_LOSS_SCALE:
        return
    raise DivergedError(
        f"step {state.step + 1}: the {bad} is not finite (loss {loss}, gradient norm {grad_norm}); nothing was "
        "updated. Lower optimizer.learning_rate, add optimizer.schedule.warmup_ratio, or set training.max_grad_norm"
    )


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)
