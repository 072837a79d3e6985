"""What a run would do, before anything is paid: `--dry-run`."""

from __future__ import annotations

from typing import Any

from tunelab import cost
from tunelab.config import Recipe
from tunelab.models.loading import load_skeleton
from tunelab.parallel import resolve_device, resolve_precision
from tunelab.progress import Progress
from tunelab.session import build_micro_batch
from tunelab.train import plan_run


def forecast(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """What a run would do: everything validated, data read and tokenised, the model built without weights."""
    plan = plan_run(recipe, progress)
    loader = plan.loader
    device = resolve_device(recipe.model.device)
    skeleton = load_skeleton(recipe.model)
    shape = cost.ModelShape.of(skeleton)
    totals = {"records": 0, "tokens": 0, "loss_tokens": 0, "flops": 0.0}
    for step in range(loader.num_steps):
        for indices in loader.micro_batches(step, recipe.training.per_device_train_batch_size):
            batch = build_micro_batch(plan.data.train, indices, None).batch
            totals["records"] += len(indices)
            totals["tokens"] += batch.num_tokens
            totals["loss_tokens"] += len(batch.targets)
            totals["flops"] += cost.training_flops(
                shape, batch.num_tokens, len(batch.targets), cost.attention_pairs(batch)
            )
    parameters = sum(p.numel() for p in skeleton.parameters())
    return {
        "method": recipe.method.name,
        "model": {"name": recipe.model.name, "parameters": parameters},
        "device": str(device),
        "precision": resolve_precision(recipe.model.precision, device).name,
        "steps": loader.num_steps,
        **totals,
        "disk_bytes": _checkpoint_bytes(recipe, parameters) * (recipe.training.save_total_limit + 2),
        "data": plan.data.record(),
        "fingerprint": recipe.fingerprint(),
    }


def _checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """Weights and optimizer state of one checkpoint. Kept at once: the limit, the best, and the one being written."""
    bytes_each = 2 if recipe.model.precision == "bf16-pure" else 4
    momentum = getattr(recipe.optimizer, "momentum", None)
    slots = 2 if momentum is None else int(momentum > 0)
    return parameters * bytes_each * (1 + slots)
