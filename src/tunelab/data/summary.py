"""What a data set holds after reading, rendering and cutting, as numbers a person can check."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tunelab.types import Example, Origin

MAX_LISTED = 50
"""Origins listed in full; beyond it, only counted."""


@dataclass(frozen=True)
class Listed:
    """How many records, and where the first MAX_LISTED of them came from (`file:line`)."""

    count: int
    origins: tuple[str, ...]

    @classmethod
    def of(cls, origins: Iterable[Origin]) -> Listed:
        names = [str(origin) for origin in origins]
        return cls(len(names), tuple(names[:MAX_LISTED]))


@dataclass(frozen=True)
class Lengths:
    """Tokens per record: percentiles by linear interpolation, mean and maximum."""

    p5: float
    p50: float
    p95: float
    mean: float
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        p5, p50, p95 = (round(float(p), 1) for p in np.percentile(lengths, (5, 50, 95)))
        return cls(p5, p50, p95, round(float(np.mean(lengths)), 1), int(max(lengths)))


@dataclass(frozen=True)
class DataSummary:
    """`records` = `used` + skipped (malformed) + excluded (not for this method) + dropped (no loss token left).

    A record counts once in `prompts_cut` or `completions_cut`, however many of its completions were cut.
    `session_render` is how a chat session must write its turns to look like this data. `total_tokens` is what packed
    rows hold; `padded_tokens` what the usual trainer would compute for the same records, in order, in batches of
    `padded_batch_size`, with the prompt repeated for each completion; `padding_avoided` = 1 - total / padded.
    """

    source: str
    split: str
    shape: str
    method: str
    render: str
    session_render: str
    loss_on: str
    max_length: int
    records: int
    used: int
    skipped: Listed
    excluded: Listed
    dropped: Listed
    prompts_cut: Listed
    completions_cut: Listed
    ignored_columns: tuple[str, ...]
    lengths: dict[str, Lengths]
    total_tokens: int
    loss_tokens: int
    padded_tokens: int
    padded_batch_size: int
    padding_avoided: float

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def sentence(self) -> str:
        """One line for a log."""
        parts = [f"{self.used:,} of {self.records:,} records of {self.source} ({self.shape}, as {self.render})"]
        for listed, what in (
            (self.skipped, "malformed"),
            (self.excluded, "undesirable"),
            (self.dropped, "left without an answer by max_length"),
            (self.prompts_cut, "prompts cut"),
            (self.completions_cut, "answers cut"),
        ):
            if listed.count:
                parts.append(f"{listed.count:,} {what} (first: {listed.origins[0]})")
        parts.append(f"{self.total_tokens:,} tokens, {self.loss_tokens:,} with loss")
        return "; ".join(parts)


def compute_lengths(examples: Sequence[Example], names: Sequence[str]) -> dict[str, Lengths]:
    """Lengths of the prompt, of each completion under its name, and of the packed record (`total`)."""
    found = {"prompt": Lengths.of([len(example.prompt_ids) for example in examples])}
    for index, name in enumerate(names):
        found[name] = Lengths.of([len(example.completions[index].ids) for example in examples])
    return found | {"total": Lengths.of([example.num_tokens for example in examples])}


def compute_padded_tokens(examples: Sequence[Example], batch_size: int) -> int:
    """Positions of batches padded to their longest sequence, each completion with its own copy of the prompt."""
    total = 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        lengths = [len(example.prompt_ids) + len(c.ids) for example in batch for c in example.completions]
        total += len(lengths) * max(lengths)
    return total


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
