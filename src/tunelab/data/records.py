"""A data source → checked records: the first half of this room, before any tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tunelab.data.problems import BadRecord, OnError, Problem
from tunelab.data.reading import Row
from tunelab.data.shapes import Shape, convert_record, shape_named
from tunelab.data.sources import open_source
from tunelab.errors import DataError
from tunelab.types import Record


@dataclass(frozen=True)
class RecordSet:
    """Records of one shape, and what was left out.

    `fingerprint` is the SHA-256 of the bytes read (as stored, so compressed bytes of a .gz), the split and the limit.
    `on_error` says what becomes of records that turn out unusable later, when a chat template refuses them.
    """

    records: tuple[Record, ...]
    shape: str
    skipped: tuple[Problem, ...]
    ignored_columns: tuple[str, ...]
    fingerprint: str
    source: str
    split: str
    on_error: OnError

    def __len__(self) -> int:
        return len(self.records)


def load_records(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    on_error: OnError = "raise",
    limit: int | None = None,
) -> RecordSet:
    """Read and check the records of a file, folder, `builtin:NAME` or hub name (`sources.py` has the rules).

    `split` and `subset` choose inside folders, built-ins and hub data sets; a single file has none and is read whole.
    `limit` keeps the first so many usable records. With `on_error="raise"` the first malformed record raises
    DataError("file:line: what is wrong"); with "skip" they are listed in `.skipped`. What concerns a file as a whole
    (missing, cut short, empty) always raises, and so does a source with no usable record.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    ignored: set[str] = set()
    digests: list[str] = []
    shape: str | None = None
    for part in open_source(source, split, subset):
        digests.append(part.digest())
        for block in part.blocks():
            found = convert_rows(block.rows(), shape, on_error, None if limit is None else limit - len(records))
            if found.problems and on_error == "raise":
                raise found.problems[0].error()
            records += found.records
            problems += found.problems
            ignored |= found.ignored
            shape = found.shape
            if len(records) == limit:
                break
        if len(records) == limit:
            break
    if shape is None:
        raise no_usable_record(source, len(problems), problems[0])
    identity = json.dumps([split, limit, digests]).encode()
    return RecordSet(
        records=tuple(records),
        shape=shape,
        skipped=tuple(problems),
        ignored_columns=tuple(sorted(ignored)),
        fingerprint=hashlib.sha256(identity).hexdigest(),
        source=source,
        split=split,
        on_error=on_error,
    )


@dataclass(frozen=True)
class Converted:
    """Consecutive rows as records. `shape` is the name of that of the records so far, None if there was none."""

    records: list[Record]
    problems: list[Problem]
    ignored: set[str]
    shape: str | None


def convert_rows(
    rows: Iterable[Row | Problem], shape: str | None, on_error: OnError, limit: int | None = None
) -> Converted:
    """Check rows and make records of them. `shape`: the name of that of the records before these, if any.

    Stops behind the `limit`-th record, and with `on_error="raise"` behind the first problem, which is then the only
    one: whether it is reached at all depends on limits only the caller knows, so nothing is raised here.
    """
    found = Converted([], [], set(), shape)
    expected = shape_named(shape) if shape else None
    for row in rows:
        try:
            record, expected, unread = _convert(row, expected)
        except BadRecord as bad:
            found.problems.append(row if isinstance(row, Problem) else bad.at(row[0]))
            if on_error == "raise":
                break
            continue
        found.records.append(record)
        found.ignored.update(unread)
        if len(found.records) == limit:
            break
    return replace(found, shape=expected.name if expected else None)


def no_usable_record(source: str, count: int, first: Problem) -> DataError:
    return DataError(f"{source}: none of its {count} records can be used; the first: {first}")


def _convert(row: Row | Problem, shape: Shape | None) -> tuple[Record, Shape, set[str]]:
    if isinstance(row, Problem):
        raise BadRecord(row.kind, row.message)
    origin, raw = row
    return convert_record(raw, origin, shape)
