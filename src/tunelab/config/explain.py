"""pydantic's findings about a recipe as one line a person can act on: place, key path, what is expected, the mend."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tunelab.config.schema import Recipe
from tunelab.errors import did_you_mean

KeyPath = tuple[str, ...]

EXAMPLES: dict[KeyPath, str] = {
    ("model",): "model: {name: smollm2-135m}",
    ("data",): "data: {train: train.jsonl}",
    ("method",): "method: {name: sft}",
    ("model", "name"): "name: smollm2-135m",
    ("data", "train"): "train: train.jsonl",
    ("method", "name"): "name: sft",
}
"""What to write for each key without a default."""

OTHER_WORDS = {
    "gpu": "cuda",
    "fp32": "float32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "prefix_length": "num_virtual_tokens",
    "pre_seq_len": "num_virtual_tokens",
    "num_layers": "last_layers",
    "prefix": "prefix_tuning",
    "prompt": "prompt_tuning",
    "p-tuning": "p_tuning",
    "ptuning": "p_tuning",
    "p-tuning-v2": "p_tuning_v2",
    "ptuning_v2": "p_tuning_v2",
}
"""Words in common use that are spelled too differently for a nearest match to find the right one."""

OTHER_NAMES: dict[KeyPath, dict[str, str]] = {
    ("adapter", "name"): {
        "dora": "lora with use_dora: true",
        "qlora": "lora with model.load_in_4bit: true",
        "rslora": "lora with use_rslora: true",
        "pissa": "lora with init_lora_weights: pissa",
        "loraplus": "lora with loraplus_lr_ratio: 16",
        "lora+": "lora with loraplus_lr_ratio: 16",
        "bitfit": "partial with biases: true",
        "freeze": "partial with last_layers: K",
        "full": "no adapter: remove the section",
    }
}
"""What has a name of its own elsewhere and is a setting here, by key path."""


@dataclass(frozen=True)
class Place:
    """Where values came from: the recipe's name, the line of each key path, and the key paths set by overrides."""

    source: str
    lines: Mapping[KeyPath, int]
    overridden: frozenset[KeyPath]

    def of(self, path: KeyPath) -> str:
        """`file:line` of the nearest key at or above `path`, or `override`."""
        if any(path[: len(key)] == key or key[: len(path)] == path for key in self.overridden):
            return "override"
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.source}:{self.lines[path[:length]]}"
        return self.source


def one_line(text: str, limit: int | None = None) -> str:
    """Text from a file as it may stand in a message: unprintable characters escaped, cut at `limit`."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def describe_value(value: Any) -> str:
    """A wrong value as it may stand after "found": `text 'fast'`, `-1`, `a list`, `nothing`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"text '{one_line(value, 40)}'"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else f"a number of {value.bit_length() * 30103 // 100000 + 1} digits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, datetime.date):
        return f"the date {one_line(str(value), 40)}"
    if isinstance(value, bytes):
        return "binary data"
    return "a set" if isinstance(value, Set) else f"a YAML {one_line(type(value).__name__, 40)}"


def explain(error: ValidationError, data: Mapping[str, Any], place: Place) -> str:
    """The first problem of a pydantic error as one line; unknown keys come before wrong values."""
    problems = error.errors(include_url=False)
    problems.sort(key=lambda p: (p["type"] != "extra_forbidden", p["type"] == "missing"))
    problem = problems[0]
    path = _user_path(problem["loc"], data)
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, problem["ctx"]["discriminator"].strip("'"))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    dotted = one_line(".".join(path), 80) or "recipe"
    return f"{place.of(path)}: {dotted}: {_message(problem, path, data)}{more}"


def known_tags(section: str) -> frozenset[str]:
    """The kinds of a top-level section that has several: sft, dpo for `method`."""
    return frozenset(tag for _, tag in _kinds(Recipe.model_fields[section]) if tag)


def _message(problem: Any, path: KeyPath, data: Mapping[str, Any]) -> str:
    kind, context, value = problem["type"], problem.get("ctx") or {}, problem.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(path, data)
    if kind in ("missing", "union_tag_not_found"):
        if path[-1].isdigit():
            return "missing; the list is too short"
        return f"missing; add e.g. `{EXAMPLES[path]}`" if path in EXAMPLES else "missing"
    if kind in ("union_tag_invalid", "literal_error"):
        return _unknown_choice(path, context, value)
    if kind == "string_too_short":
        return "is empty"
    if kind == "too_long":
        return f"expected at most {context['max_length']} values, found {context['actual_length']}"
    if kind == "value_error":
        return one_line(str(context["error"]), 300)
    return f"expected {_expected(kind, context)}, found {describe_value(value)}{_value_mend(kind, value)}"


def _unknown_choice(path: KeyPath, context: Mapping[str, Any], value: Any) -> str:
    expected = str(context.get("expected_tags") or context.get("expected"))
    names = [name.strip(" '") for name in expected.replace(" or ", ", ").split(",")]
    names = ["true" if name == "True" else name for name in names]
    if "tag" in context and isinstance(value, Mapping):
        value = value.get(context["discriminator"].strip("'"))
    if not isinstance(value, str):
        return f"expected one of {', '.join(names)}, found {describe_value(value)}"
    other, setting = OTHER_WORDS.get(value.lower()), OTHER_NAMES.get(path, {}).get(value.lower())
    if setting is not None:
        hint = f"; {value.lower()} is {setting}"
    else:
        hint = f" (did you mean '{other}'?)" if other in names else did_you_mean(value.lower(), names)
    return f"'{one_line(value, 40)}' is not one of {', '.join(names)}{hint}"


def _expected(kind: str, context: Mapping[str, Any]) -> str:
    """pydantic's error type in words."""
    bounds = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", "≥"), "less_than": ("lt", "<")}
    bounds["less_than_equal"] = ("le", "≤")
    if kind in bounds:
        name, sign = bounds[kind]
        bound = context[name]
        return f"a number {sign} {int(bound) if bound == int(bound) else bound}"
    words = {
        "float_type": "a number",
        "finite_number": "a finite number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "string_type": "text",
        "string_unicode": "valid Unicode text",
        "string_pattern_mismatch": "letters, digits, '.', '_' and '-', beginning with a letter or digit",
        "bool_type": "true or false",
        "tuple_type": "a list [ ]",
        "model_type": "a section (key: value lines)",
        "model_attributes_type": "a section (key: value lines)",
    }
    return words[kind]


def _value_mend(kind: str, value: Any) -> str:
    """What to do about a value of the wrong type, where the slip is a usual one."""
    if kind in ("float_type", "int_type") and isinstance(value, str) and _is_number(value):
        return "; remove the quotes"
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        return f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if kind == "string_type" and isinstance(value, int | float | datetime.date):
        return "; put it in quotes"
    if kind in ("model_type", "model_attributes_type") and value is None:
        return "; fill it in or remove the line"
    if kind == "tuple_type" and isinstance(value, str):
        return f"; write [{one_line(value, 40)}]"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unknown_key(path: KeyPath, data: Mapping[str, Any]) -> str:
    """Where the key belongs if another section has it, else the nearest key here, else all keys here."""
    word = path[-1]
    if "." in word:
        return "unknown key; write the dots as nested sections, or give it as an override on the command line"
    known = _known_keys(path[:-1], data)
    wanted = OTHER_WORDS.get(word.lower(), word)
    if wanted in known:
        return f"unknown key (did you mean '{wanted}'?)"
    homes = list(_homes(word)) or list(_homes(wanted))
    own = _section_tags(path[:-1], data)
    kinds = list(dict.fromkeys(f"'{tag}'" for home, tag in homes if home == path and tag))
    if own and kinds:
        return f"unknown key of '{own}'; {_listed(kinds)} it"
    for home, _ in homes:
        if home != path:
            return f"unknown key here (did you mean {'.'.join(home)}?)"
    hint = did_you_mean(word, known) or f"; known here: {', '.join(sorted(known))}"
    return f"unknown key{hint}"


def _listed(kinds: list[str]) -> str:
    """`'a' reads`, `'a' and 'b' read`, `'a', 'b' and 'c' read`."""
    if len(kinds) == 1:
        return f"{kinds[0]} reads"
    return f"{', '.join(kinds[:-1])} and {kinds[-1]} read"


def _section_tags(path: KeyPath, data: Mapping[str, Any]) -> str | None:
    """The kind the recipe gives to the section at `path`: `sgd` for `optimizer: {name: sgd}`."""
    node: Any = data
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping):
        return None
    return next((node[key] for key in ("lr_scheduler_type", "name") if isinstance(node.get(key), str)), None)


def _user_path(loc: tuple[Any, ...], data: Mapping[str, Any]) -> KeyPath:
    """pydantic's location without the union tags it inserts (`method.dpo.beta` → `method.beta`)."""
    path: list[str] = []
    field: FieldInfo | None = None
    schema: type[BaseModel] | None = Recipe
    for part in loc:
        if schema is None and field is not None and (tagged := dict(_by_tag(field))).get(part):
            schema, field = tagged[part], None
            continue
        path.append(str(part))
        field = schema.model_fields.get(str(part)) if schema is not None else None
        schema = _only_kind(field)
    return tuple(path)


def _by_tag(field: FieldInfo) -> Iterator[tuple[str, type[BaseModel]]]:
    return ((tag, schema) for schema, tag in _kinds(field) if tag is not None)


def _only_kind(field: FieldInfo | None) -> type[BaseModel] | None:
    """The schema of a section that has one kind only."""
    kinds = list(_kinds(field)) if field is not None else []
    return kinds[0][0] if len(kinds) == 1 and kinds[0][1] is None else None


def _kinds(field: FieldInfo) -> Iterator[tuple[type[BaseModel], str | None]]:
    """The schemas a field's section may have, each with the tag that chooses it (None if there is no choice).

    A section that may be left out (`… | None`) has those of what stands beside the None.
    """
    annotation, discriminator = field.annotation, field.discriminator
    while get_origin(annotation) in (Annotated, Union, UnionType):
        if get_origin(annotation) is Annotated:
            annotation, *notes = get_args(annotation)
            discriminator = next((n.discriminator for n in notes if isinstance(n, FieldInfo)), discriminator)
            continue
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) > 1:
            break
        annotation = members[0]
    if get_origin(annotation) in (Union, UnionType) and isinstance(discriminator, str):
        for member in get_args(annotation):
            for tag in get_args(member.model_fields[discriminator].annotation):
                yield member, tag
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, None


def _homes(word: str) -> Iterator[tuple[KeyPath, str | None]]:
    """Every key path of the schema that ends in `word`, with the kind of its section."""

    def search(schema: type[BaseModel], path: KeyPath, tag: str | None) -> Iterator[tuple[KeyPath, str | None]]:
        for name, field in schema.model_fields.items():
            if name == word:
                yield (*path, name), tag
            for section, kind in _kinds(field):
                yield from search(section, (*path, name), kind)

    return search(Recipe, (), None)


def _known_keys(path: KeyPath, data: Mapping[str, Any]) -> list[str]:
    """Valid keys of the section at `path`, following discriminated unions by the recipe's own tags."""
    schema: type[BaseModel] | None = Recipe
    for depth, part in enumerate(path):
        field = schema.model_fields.get(part) if schema is not None else None
        tag = _section_tags(path[: depth + 1], data)
        schema = next((s for s, t in _kinds(field) if t in (None, tag)), None) if field is not None else None
    return list(schema.model_fields) if schema is not None else []
