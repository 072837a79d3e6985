"""The nearest changes to a recipe that make it fit, each with its own forecast, in the order of how little they change.

Smaller micro-batches and checkpointing compute the same training; a leaner optimizer, narrower numbers and adapters do
not, and say so. Combinations are tried when no single change is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tunelab import cost
from tunelab.config import Recipe, parse_recipe
from tunelab.errors import ConfigError
from tunelab.forecast import Target
from tunelab.forecast.counts import count
from tunelab.forecast.run import peak_bytes
from tunelab.models.logprobs import CHUNK_SIZE
from tunelab.session import MICRO_BATCH_TOKENS, Plan

MOST_SHOWN = 4
STORED, PURE = "bf16-stored", "bf16-pure"


@dataclass(frozen=True)
class Change:
    """`overrides`: key.path → value of the recipe. cost: how far it is from the training asked for."""

    overrides: tuple[tuple[str, str], ...]
    effect: str
    cost: int

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(key for key, _ in self.overrides)


NOTHING = Change((), "", 0)


def advise(plan: Plan, target: Target) -> list[dict[str, Any]]:
    """Up to MOST_SHOWN changes that fit `target`, the least first: overrides, effects, peak_bytes.

    A change that contains another that fits as well is left out.
    """
    assert target.memory_bytes is not None
    chosen: list[tuple[Change, ...]] = []
    found = []
    peaks = _Peaks(plan, target)
    for combination in _combinations(plan.recipe, plan, target.device_type):
        if any(_contains(combination, smaller) for smaller in chosen):
            continue
        peak = peaks.of(combination)
        if peak is None or peak > target.memory_bytes:
            continue
        chosen.append(combination)
        found.append(
            {
                "overrides": [f"{key}={value}" for change in combination for key, value in change.overrides],
                "effects": [change.effect for change in combination],
                "peak_bytes": peak,
            }
        )
        if len(found) == MOST_SHOWN:
            break
    return found


def _combinations(recipe: Recipe, plan: Plan, device_type: str) -> Iterator[tuple[Change, ...]]:
    """Every way to take at most one change of each kind, the least change first."""
    kinds = [_micro_batches(recipe, plan, device_type), _checkpointing(recipe), _evaluation(recipe)]
    kinds += [_precision(recipe, device_type), _optimizer(recipe), _adapter(recipe)]
    ways = [tuple(c for c in way if c is not NOTHING) for way in product(*([NOTHING, *kind] for kind in kinds))]
    ways = [way for way in ways if way and _is_sensible(recipe, way)]
    yield from sorted(ways, key=lambda way: (sum(c.cost for c in way), len(way)))


def _is_sensible(recipe: Recipe, way: tuple[Change, ...]) -> bool:
    """Weights that learn keep their products in float32, as was asked for; frozen ones need no random rounding."""
    pairs = {pair for change in way for pair in change.overrides}
    frozen = (recipe.adapter is not None and recipe.adapter.name != "partial") or ("adapter.name", "lora") in pairs
    return ("model.precision", STORED if frozen else PURE) not in pairs


def _micro_batches(recipe: Recipe, plan: Plan, device_type: str) -> list[Change]:
    """Halved until a micro-batch is one record; the records of an optimizer step stay the same."""
    training, changes = recipe.training, []
    lengths = plan.data.train.num_tokens
    budget = training.max_tokens_per_micro_batch or MICRO_BATCH_TOKENS[device_type]
    tokens = min(budget, int(lengths.max()) * training.per_device_train_batch_size)
    far = 1
    while tokens > int(lengths.max()):
        tokens = max(tokens // 2, int(lengths.max()))
        effect = "the same training in smaller micro-batches"
        changes.append(Change((("training.max_tokens_per_micro_batch", str(tokens)),), effect, far))
        far += 1
    return changes


def _checkpointing(recipe: Recipe) -> list[Change]:
    if recipe.training.gradient_checkpointing:
        return []
    effect = "the same training, about a third slower: activations are computed again"
    return [Change((("training.gradient_checkpointing", "true"),), effect, 4)]


def _evaluation(recipe: Recipe) -> list[Change]:
    if recipe.evaluation.per_device_eval_batch_size == 1:
        return []
    return [Change((("evaluation.per_device_eval_batch_size", "1"),), "the same training, slower evaluation", 2)]


def _precision(recipe: Recipe, device_type: str) -> list[Change]:
    name = recipe.model.precision
    if name in ("bf16-pure", "bf16-stored") or (name == "auto" and device_type == "cuda" and recipe.model.load_in_4bit):
        return []
    found = []
    if name == "float32" and device_type == "cuda":
        found.append(Change((("model.precision", "bf16"),), "products rounded to bf16, weights in float32", 6))
    told = "weights kept in bf16 alone, rounded stochastically; products in float32"
    found.append(Change((("model.precision", STORED),), told, 10))
    found.append(Change((("model.precision", PURE),), "frozen weights and products in bf16", 10))
    return found


def _optimizer(recipe: Recipe) -> list[Change]:
    if recipe.optimizer.name not in ("adam", "adamw"):
        return []
    found = [Change((("optimizer.name", "adamw_8bit"),), "moments in 8 bits: nearly the same training", 8)]
    if recipe.adapter is None:
        effect = "AdamW's update with both moments in 4 bits, clipped by the matrix"
        found.append(Change((("optimizer.name", "quarter"),), effect, 12))
    return found


def _adapter(recipe: Recipe) -> list[Change]:
    found = []
    lora = () if recipe.adapter is not None else (("adapter.name", "lora"),)
    if lora:
        effect = "another method: low-rank adapters on frozen weights; a learning rate about ten times higher"
        found.append(Change(lora, effect, 18))
    if not recipe.model.load_in_4bit and (recipe.adapter is None or recipe.adapter.name != "partial"):
        said = "QLoRA: adapters on a base of 4 bits a weight" if lora else "the frozen base in 4 bits a weight, rounded"
        found.append(Change((*lora, ("model.load_in_4bit", "true")), said, 24))
    return found


def _contains(combination: tuple[Change, ...], smaller: tuple[Change, ...]) -> bool:
    """Whether every change of `smaller` is in the combination too, as it is or further in the same direction."""
    return all(any(c.keys == other.keys and c.cost >= other.cost for c in combination) for other in smaller)


class _Peaks:
    """Forecast peaks of changed recipes. What is packed depends on the micro-batches' sizes alone: counted once."""

    def __init__(self, plan: Plan, target: Target) -> None:
        self.plan, self.target = plan, target
        self.workloads: dict[tuple[int | None, int], cost.Workload] = {}

    def of(self, changes: tuple[Change, ...]) -> int | None:
        """Bytes; None where the changes make no valid recipe."""
        try:
            recipe = changed(self.plan.recipe, [pair for change in changes for pair in change.overrides])
            plan = replace(self.plan, recipe=recipe)
            key = (recipe.training.max_tokens_per_micro_batch, recipe.evaluation.per_device_eval_batch_size)
            if key not in self.workloads:
                self.workloads[key] = count(plan, self.target.device_type, CHUNK_SIZE).workload
            return peak_bytes(plan, self.target, self.workloads[key])
        except ConfigError:
            return None


def changed(recipe: Recipe, overrides: list[tuple[str, str]]) -> Recipe:
    """The recipe with overrides; another optimizer begins with its own defaults."""
    data = {name: section for name, section in recipe.resolved().items() if section is not None}
    if any(key == "optimizer.name" for key, _ in overrides):
        data["optimizer"] = {"learning_rate": recipe.optimizer.learning_rate}
    return parse_recipe(data, [f"{key}={value}" for key, value in overrides])
