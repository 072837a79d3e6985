"""What `tunelab runs` shows: a filtered list of runs, and runs side by side. Plain JSON-able data; nothing is printed.

A filter is `key=value`, `key!=value`, or `<`, `<=`, `>`, `>=` with a number. Keys are the columns of the list
(`status`, `method`, `model`), metrics (`eval/loss`), costs (`cost.tokens`) and dotted recipe keys (`optimizer.name`).
"""

from __future__ import annotations

import json
import math
import operator
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from tunelab.config import Recipe
from tunelab.errors import ConfigError, did_you_mean
from tunelab.runs import RunFolder

SCHEMA_VERSION = 1

_COLUMNS = ("name", "method", "status", "created", "finished", "model")
_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
_KNOWN = frozenset(
    {"train/loss", "eval/loss", "eval_train/loss", "grad_norm", "learning_rate", "tokens_per_second"}
    | {prefix + name for prefix in ("", "eval/", "eval_train/") for name in _REWARDS}
    | {"cost.tokens", "cost.flops", "cost.seconds.total", "cost.seconds.training", "cost.peak_memory_bytes"}
)
"""Keys that are worth a filter even before any run has them; all that the given runs logged are accepted too."""

_PLACES = frozenset({"training.run_name", "training.output_dir"})
"""Recipe keys that say where a run lives, and differ between any two."""

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FILTER = re.compile(r"^\s*([^=<>!\s]+)\s*(!=|<=|>=|==|=|<|>)\s*(.*?)\s*$")


@dataclass(frozen=True)
class Filter:
    """One condition on a run."""

    key: str
    comparison: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Raises ConfigError if `text` is no condition, or orders by something that is no number."""
        match = _FILTER.match(text)
        if match is None or not match[3]:
            raise ConfigError(f"filter '{text}': expected key=value or key<number, e.g. method=dpo or 'eval/loss<2.5'")
        key, comparison, value = match.groups()
        comparison = "=" if comparison == "==" else comparison
        if comparison not in ("=", "!=") and _number(value) is None:
            raise ConfigError(f"filter '{text}': '{comparison}' compares numbers, and '{value}' is none")
        return cls(key, comparison, value)

    def accepts(self, actual: object) -> bool:
        """Numbers compare as numbers, all else as text. A run that lacks the key is accepted by `!=` alone."""
        if actual is None and self.value not in ("null", "none"):
            return self.comparison == "!="
        found, wanted = _number(actual), _number(self.value)
        if found is not None and wanted is not None:
            return _COMPARISONS[self.comparison](found, wanted)
        if self.comparison not in ("=", "!="):
            return False
        return _COMPARISONS[self.comparison](_text(actual), "null" if self.value == "none" else self.value)


@dataclass(frozen=True)
class _View:
    """A run with everything a filter or a comparison may ask for, each part read once and only if asked."""

    run: RunFolder

    @cached_property
    def record(self) -> dict[str, Any]:
        return self.run.record()

    @cached_property
    def config(self) -> dict[str, Any]:
        return flatten(self.run.recipe().resolved())

    @cached_property
    def columns(self) -> dict[str, Any]:
        model = (self.record.get("model") or {}).get("source")
        columns = {"name": self.run.name, **{key: self.record.get(key) for key in _COLUMNS[1:]}}
        return columns | {"model": model or self.config["model.name"]}

    @cached_property
    def sizes(self) -> dict[str, int | None]:
        """How many parameters the model has, and how many of them are trained."""
        model = self.record.get("model") or {}
        return {key: model.get(key) for key in ("parameters", "trainable_parameters")}

    @cached_property
    def metrics(self) -> dict[str, float]:
        return final_metrics(self.run)

    @cached_property
    def cost(self) -> dict[str, Any]:
        return flatten(self.record.get("cost") or {}, "cost.")

    def __getitem__(self, key: str) -> Any:
        """The value of a known key; None where this run has none."""
        if key in _COLUMNS:
            return self.columns[key]
        if key.startswith("cost."):
            return self.cost.get(key)
        return self.metrics[key] if key in self.metrics else self.config.get(key)


def list_table(runs: Sequence[RunFolder], filters: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row for each run that passes all filters, in the order given.

    Keys of a row: name, method, status, created, finished, model, path, steps, tokens, seconds, peak_memory_bytes,
    parameters, trainable_parameters and metrics (see `final_metrics`); what a run does not know is None. Raises
    ConfigError for a filter that is malformed or names a key that no run and no recipe has.
    """
    views = [_View(run) for run in runs]
    conditions = [Filter.parse(text) for text in filters]
    for condition in conditions:
        _check_key(condition.key, views)
    return [_row(view) for view in views if all(c.accepts(view[c.key]) for c in conditions)]


def _row(view: _View) -> dict[str, Any]:
    cost = view.cost
    return {
        **view.columns,
        "path": str(view.run.path),
        "steps": cost.get("cost.steps"),
        "tokens": cost.get("cost.tokens"),
        "seconds": cost.get("cost.seconds.total"),
        "peak_memory_bytes": cost.get("cost.peak_memory_bytes"),
        **view.sizes,
        "metrics": view.metrics,
    }


def _check_key(key: str, views: Iterable[_View]) -> None:
    if key in _COLUMNS or key in recipe_keys():
        return
    seen = _KNOWN.union(*((*view.metrics, *view.cost) for view in views))
    if key not in seen:
        known = [*_COLUMNS, *sorted(seen), *sorted(recipe_keys())]
        hint = did_you_mean(key, known) or (
            f"; filter by {', '.join(_COLUMNS)}, a metric (eval/loss), cost.* or a recipe key (optimizer.name)"
        )
        raise ConfigError(f"filter '{key}': no such key{hint}")


def compare(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Runs side by side; every list has one value a run, None where the run has none.

    {"schema_version", "runs": names, "status", "config_diff": {dotted key: values} for keys that differ (not where the
    runs live), "metrics": {name: values} as `final_metrics`, "evaluation": {metric: intervals} of each run's own arm in
    its evaluation.json, "model": {"parameters", "trainable_parameters"}, "cost": {key: values}}.
    """
    views = [_View(run) for run in runs]
    config = _side_by_side([view.config for view in views])
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [run.name for run in runs],
        "status": [view.record.get("status") for view in views],
        "config_diff": {
            key: values
            for key, values in config.items()
            if key not in _PLACES and any(value != values[0] for value in values)
        },
        "metrics": _side_by_side([view.metrics for view in views]),
        "evaluation": _side_by_side([_own_arm(run) for run in runs]),
        "model": _side_by_side([view.sizes for view in views]),
        "cost": _side_by_side([flatten(view.record.get("cost") or {}) for view in views]),
    }


def _side_by_side(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    keys = {key: None for mapping in mappings for key in mapping}
    return {key: [mapping.get(key) for mapping in mappings] for key in keys}


def _own_arm(run: RunFolder) -> dict[str, Any]:
    """Metrics of the last arm of evaluation.json, which is the run's own model."""
    path = run.path / "evaluation.json"
    if not path.exists():
        return {}
    arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
    return dict(arms[-1]["metrics"]) if arms else {}


def final_metrics(run: RunFolder) -> dict[str, float]:
    """What the kept model measured: the last train row's metrics, and the evaluation at the best step.

    Without a best step (no held-out data, or the run did not finish), the last evaluation. Finite numbers only.
    """
    rows = run.metrics()
    best = (run.record().get("best") or {}).get("step")
    evaluations = [row for row in rows if row["phase"] == "eval"]
    kept = [row for row in evaluations if row["step"] == best] or evaluations
    chosen = [row for row in rows if row["phase"] == "train"][-1:] + kept[-1:]
    return {
        key: value
        for row in chosen
        for key, value in row.items()
        if key not in ("step", "phase", "time") and isinstance(value, int | float) and math.isfinite(value)
    }


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def recipe_keys() -> frozenset[str]:
    """Every dotted key that some valid recipe can have, all members of each union included."""
    return frozenset(_section_keys(Recipe, ""))


def _section_keys(section: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in section.model_fields.items():
        members = _members(field.annotation)
        nested = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
        for member in nested:
            yield from _section_keys(member, f"{prefix}{name}.")
        if len(nested) < len(members):  # a plain value, or a section that may be null
            yield f"{prefix}{name}"


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types a field may have: the members of a union, else the annotation itself."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return (annotation,)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _text(value: object) -> str:
    """As YAML and JSON write it: true, null, [a, b]."""
    return value if isinstance(value, str) else json.dumps(value)
