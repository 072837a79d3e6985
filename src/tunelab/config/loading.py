"""YAML and dotted overrides in, a validated `Recipe` out; every error on one line with place and mend.

YAML is read as version 1.2: `1e-4` is a number and `no` is a string (PyYAML reads both the other way).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tunelab.config.schema import Recipe
from tunelab.errors import ConfigError, did_you_mean


def load_recipe(path: str | Path, overrides: Sequence[str] = (), method: str | None = None) -> Recipe:
    """Read a recipe file and apply `key.path=value` overrides.

    `method` is the command's name (`sft`, `dpo`): it fills in a missing `method.name` and must agree with a given one.
    Raises ConfigError naming the file and line, or the key path, and the mend.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        known = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such recipe file{did_you_mean(path.name, known)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the YAML file of a recipe") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_recipe(_parse_yaml(text, str(path)), overrides, method, source=str(path))


def parse_recipe(
    data: Mapping[str, Any], overrides: Sequence[str] = (), method: str | None = None, source: str = "recipe"
) -> Recipe:
    """Validate a mapping as a `Recipe`, after overrides. `source` names it in errors. Raises ConfigError."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected sections such as model, data and method, found {_kind(data)}")
    lines = _line_numbers(data)
    plain = _plain(data)
    overridden: set[tuple[str, ...]] = set()
    for override in overrides:
        overridden.add(_apply_override(plain, override))
    if method is not None:
        section = plain.setdefault("method", {})
        if isinstance(section, dict):
            given = section.setdefault("name", method)
            if given != method:
                raise ConfigError(
                    f"{source}: method.name is '{given}' but the command is '{method}'; "
                    f"run `tunelab {given}` or set method.name={method}"
                )
    for name in ("optimizer",):
        section = plain.get(name)
        if isinstance(section, dict):
            section.setdefault("name", "adamw")
            schedule = section.get("schedule")
            if isinstance(schedule, dict):
                schedule.setdefault("lr_scheduler_type", "linear")
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(_explain(error, plain, lines, overridden, source)) from None


def _parse_yaml(text: str, source: str) -> Any:
    yaml = YAML(typ="rt")
    yaml.allow_duplicate_keys = False
    try:
        data = yaml.load(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = " ".join(str(error.problem or "not valid YAML").split())
        raise ConfigError(f"{where}: {problem}; mend the YAML") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML ({' '.join(str(error).split())[:120]}); mend it") from None
    if data is None:
        raise ConfigError(f"{source}: empty; a recipe needs at least model, data and method")
    return data


def _apply_override(data: dict[str, Any], override: str) -> tuple[str, ...]:
    key, separator, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not separator or not all(path):
        raise ConfigError(f"override '{override}': expected key.path=value, e.g. optimizer.learning_rate=1e-5")
    value = _plain(_parse_yaml(text, f"override '{override}'")) if text.strip() else None
    node = data
    for depth, part in enumerate(path[:-1]):
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': {'.'.join(path[: depth + 1])} is a value, not a section")
        node = child
    node[path[-1]] = value
    return path


def _plain(node: Any) -> Any:
    """ruamel's round-trip containers and scalars as plain Python ones (pydantic runs in strict mode)."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _line_numbers(node: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """1-based line of every key path of a parsed YAML document."""
    lines: dict[tuple[str, ...], int] = {}
    if isinstance(node, CommentedMap):
        for key, value in node.items():
            lines[(*path, str(key))] = node.lc.key(key)[0] + 1 if key in node.lc.data else 0
            lines |= _line_numbers(value, (*path, str(key)))
    elif isinstance(node, CommentedSeq):
        for index, value in enumerate(node):
            lines |= _line_numbers(value, (*path, str(index)))
    return lines


def _explain(
    error: ValidationError,
    data: dict[str, Any],
    lines: dict[tuple[str, ...], int],
    overridden: set[tuple[str, ...]],
    source: str,
) -> str:
    """The first problem of a pydantic error as one line; unknown keys come before wrong values."""
    problems = error.errors(include_url=False)
    problems.sort(key=lambda p: (p["type"] != "extra_forbidden", p["type"] == "missing"))
    problem = problems[0]
    path = _user_path(problem["loc"], data)
    dotted = ".".join(path) or "recipe"
    if any(path[: len(key)] == key or key[: len(path)] == path for key in overridden):
        where = "override"
    elif line := next((lines[path[:n]] for n in range(len(path), 0, -1) if lines.get(path[:n])), 0):
        where = f"{source}:{line}"
    else:
        where = source
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {dotted}: {_message(problem, path, data)}{more}"


def _message(problem: Any, path: tuple[str, ...], data: dict[str, Any]) -> str:
    kind, context, value = problem["type"], problem.get("ctx") or {}, problem.get("input")
    if kind == "extra_forbidden":
        known = _known_keys(path[:-1], data)
        hint = did_you_mean(path[-1], known) or f"; known here: {', '.join(sorted(known))}"
        return f"unknown key{hint}"
    if kind == "missing":
        return "missing; it has no default"
    if kind in ("union_tag_invalid", "literal_error"):
        expected = str(context.get("expected_tags") or context.get("expected"))
        tag = context.get("tag", value)
        names = [name.strip(" '") for name in expected.replace(" or ", ", ").split(",")]
        return f"'{tag}' is not one of {', '.join(names)}{did_you_mean(str(tag), names)}"
    if kind == "union_tag_not_found":
        return f"needs {context.get('discriminator', 'name')}"
    if kind == "value_error":
        return str(context.get("error", problem["msg"]))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected a section (key: value lines), found {_kind(value)}"
    text = problem["msg"].removeprefix("Input should be ").removeprefix("a ").removeprefix("valid ")
    return f"expected {text}, found {_kind(value)}"


def _kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "text", dict: "section", list: "list"}
    if value is None:
        return "nothing (null)"
    shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."
    name = next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)
    return f"{name} {shown}" if not isinstance(value, dict | list) else f"a {name}"


def _user_path(loc: tuple[Any, ...], data: dict[str, Any]) -> tuple[str, ...]:
    """pydantic's location without the union tags it inserts (`method.dpo.beta` → `method.beta`)."""
    path: list[str] = []
    node: Any = data
    parts = list(loc)
    for index, part in enumerate(parts):
        if isinstance(node, dict) and part not in node and index < len(parts) - 1:
            tags = {node.get("name"), node.get("lr_scheduler_type")}
            if part in tags:
                continue
        elif isinstance(node, dict) and part not in node and part in {node.get("name"), node.get("lr_scheduler_type")}:
            continue
        path.append(str(part))
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            node = None
    return tuple(path)


def _known_keys(path: tuple[str, ...], data: dict[str, Any]) -> list[str]:
    """Valid keys of the section at `path`, following discriminated unions by the recipe's own tags."""
    schema: type[BaseModel] | None = Recipe
    node: Any = data
    for part in path:
        field = schema.model_fields.get(part) if schema else None
        node = node.get(part) if isinstance(node, dict) else None
        schema = _section_of(field.annotation, field.discriminator, node) if field else None
    return list(schema.model_fields) if schema else []


def _section_of(annotation: Any, discriminator: Any, node: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is Union:
        tag = node.get(discriminator) if isinstance(node, dict) else None
        for member in get_args(annotation):
            field = member.model_fields.get(discriminator)
            if field is not None and tag in get_args(field.annotation):
                return member
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
