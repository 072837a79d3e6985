"""What a run would do, before anything is paid: `--dry-run`."""

from __future__ import annotations

from typing import Any

import torch

from tunelab import cost
from tunelab.config import Recipe
from tunelab.models.adapters import ADAPTER_DTYPE, adapt_skeleton
from tunelab.models.loading import load_skeleton
from tunelab.models.logprobs import CHUNK_SIZE
from tunelab.parallel import Precision, resolve_device, resolve_precision
from tunelab.progress import Progress
from tunelab.session import build_micro_batch
from tunelab.train import plan_run
from tunelab.types import Batch


def forecast(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """What a run would do: everything validated, data read and tokenised, the model built without weights."""
    plan = plan_run(recipe, progress)
    loader = plan.loader
    device = resolve_device(recipe.model.device)
    skeleton = load_skeleton(recipe.model)
    if recipe.adapter is not None:
        adapt_skeleton(skeleton, recipe.adapter)
    shape = cost.ModelShape.of(skeleton)
    totals = {"records": 0, "tokens": 0, "loss_tokens": 0, "flops": 0.0, "floor_flops": 0.0}
    largest: Batch | None = None
    for step in range(loader.num_steps):
        for indices in plan.micro_batches(step):
            batch = build_micro_batch(plan.data.train, indices, None).batch
            totals["records"] += len(indices)
            totals["tokens"] += batch.num_tokens
            totals["loss_tokens"] += len(batch.targets)
            totals["flops"] += cost.training_flops(
                shape, batch.num_tokens, len(batch.targets), cost.attention_pairs(batch)
            )
            totals["floor_flops"] += cost.floor_flops(shape, batch)
            if largest is None or batch.num_tokens > largest.num_tokens:
                largest = batch
    assert largest is not None  # a plan has a step, and a step has records
    parameters = sum(p.numel() for p in skeleton.parameters())
    trainable = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    precision = resolve_precision(recipe.model.precision, device)
    return {
        "method": recipe.method.name,
        "model": {"name": recipe.model.name, "parameters": parameters, "trainable_parameters": trainable},
        "device": str(device),
        "precision": precision.name,
        "steps": loader.num_steps,
        **totals,
        "memory_floor_bytes": _memory_floor(recipe, shape, skeleton, precision, largest).total,
        "disk_bytes": _checkpoint_bytes(recipe, trainable) * (recipe.training.save_total_limit + 2),
        "data": plan.data.record(),
        "fingerprint": recipe.fingerprint(),
    }


def _memory_floor(
    recipe: Recipe, shape: cost.ModelShape, skeleton: torch.nn.Module, precision: Precision, batch: Batch
) -> cost.MemoryFloor:
    """What training takes at the least, with `batch` the largest of its micro-batches."""
    weights, compute = precision.weights_dtype, precision.compute_dtype or precision.weights_dtype
    return cost.floor_memory(
        shape,
        parameters=sum(p.numel() for p in skeleton.parameters()),
        trainable=sum(p.numel() for p in skeleton.parameters() if p.requires_grad),
        tokens=batch.num_tokens,
        predictors=cost.predictor_counts(batch)[0],
        chunk_size=CHUNK_SIZE,
        weight_bytes=weights.itemsize,
        trainable_bytes=weights.itemsize if recipe.adapter is None else ADAPTER_DTYPE.itemsize,
        activation_bytes=compute.itemsize,
        optimizer_slots=_optimizer_slots(recipe),
    )


def _checkpoint_bytes(recipe: Recipe, trainable: int) -> int:
    """What is trained, and its optimizer state, of one checkpoint: an adapter's base model is not written.

    Kept at once: the limit, the best, and the one being written.
    """
    bytes_each = 2 if recipe.model.precision == "bf16-pure" and recipe.adapter is None else ADAPTER_DTYPE.itemsize
    return trainable * bytes_each * (1 + _optimizer_slots(recipe))


def _optimizer_slots(recipe: Recipe) -> int:
    """Numbers an optimizer keeps of each parameter."""
    momentum = getattr(recipe.optimizer, "momentum", None)
    return 2 if momentum is None else int(momentum > 0)
