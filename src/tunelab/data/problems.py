"""What can be wrong with a record, as data.

Record-level problems are `BadRecord` inside this room and leave it in one of two ways, by `data.on_error`: as a
DataError that ends the command (`raise`), or as a `Problem` that is counted and listed (`skip`). File-level problems
(missing, cut short, not what the name says) are DataErrors at once: nobody can say what a broken file would have held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tunelab.errors import DataError
from tunelab.types import Origin

OnError = Literal["raise", "skip"]

Kind = Literal[
    "json",  # the line is not one JSON object
    "encoding",  # not UTF-8, a NUL byte, half a surrogate pair
    "row",  # a CSV row with more or fewer cells than the header
    "shape",  # the fields are not those of any record shape
    "mixed-shapes",  # a known shape, but not the first record's
    "field",  # missing, null or of another type
    "empty",  # nothing but white space where text is needed
    "role",  # a speaker nobody knows
    "turns",  # turns in an order that cannot be trained on
    "transcript",  # not an hh-rlhf transcript
    "identical",  # chosen equals rejected
    "prompts-differ",  # chosen and rejected answer different prompts
    "template",  # the tokenizer's chat template refuses the turns, or does not keep earlier ones as they were
]


_MAX_MESSAGE = 500
"""Characters. Field names and roles come from the data and may be anything."""


class BadRecord(Exception):  # noqa: N818  (not for the user: always caught in this room)
    """One record cannot be used; the caller knows where it came from."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = one_line(message)

    def at(self, origin: Origin) -> Problem:
        return Problem(origin, self.message, self.kind)


@dataclass(frozen=True)
class Problem:
    """A record that was left out, and why."""

    origin: Origin
    message: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}"

    def error(self) -> DataError:
        return DataError(f"{self} (data.on_error: skip leaves such records out)")


def one_line(text: str) -> str:
    """Text from the data inside a message: control characters escaped, and not a page of it."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:_MAX_MESSAGE])
    return shown + ("…" if len(text) > _MAX_MESSAGE else "")


def describe(value: Any) -> str:
    """A JSON value's kind, in words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"number {value}" if len(str(value)) <= 20 else "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else type(value).__name__
