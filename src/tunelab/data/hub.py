"""Data sets of the Hugging Face hub, through the optional `datasets` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunelab.data.reading import ParsedRows, Row, row_blocks
from tunelab.errors import DataError, MachineError
from tunelab.types import Origin

OFFLINE_MEND = "a local file or folder, or builtin:helpful-mini, works without it"


@dataclass(frozen=True)
class HubTable:
    """One split of a data set, which `datasets` keeps on disk and hands out row by row. `name` as shown in messages."""

    name: str
    table: Any

    def digest(self) -> str:
        """SHA-256 over the rows as JSON. What is on disk does not change: they are gone through once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for values in self.table:
            digest.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def blocks(self) -> Iterator[ParsedRows]:
        number, total = 0, len(self.table)

        def rows() -> Iterator[Row]:
            nonlocal number
            for values in self.table:
                number += 1
                yield Origin(self.name, number), values

        return row_blocks(rows(), lambda: number / total)


def open_table(name: str, split: str, subset: str | None) -> HubTable:
    """One split of a data set of the hub. `subset`: one of its configurations, else a `data_dir`.

    Raises MachineError if `datasets` is not installed or the hub cannot be reached, DataError if the hub has no such
    data set, subset or split.
    """
    try:
        import datasets
    except ImportError:
        raise MachineError(
            f"{name}: no such file here, and a hub data set needs an extra: pip install 'tunelab[hub]'; {OFFLINE_MEND}"
        ) from None
    try:
        table = _load(datasets, name, split, subset)
    except ConnectionError as error:
        raise MachineError(f"{name}: no such file here, and no hub in reach ({_line(error)}); {OFFLINE_MEND}") from None
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{name}: no such file here, and not readable from the hub: {_line(error)}") from None
    return HubTable(f"{name}/{subset}[{split}]" if subset else f"{name}[{split}]", table)


def _load(datasets: Any, name: str, split: str, subset: str | None) -> Any:
    where: dict[str, str] = {}
    if subset is not None:
        where = {"name" if subset in datasets.get_dataset_config_names(name) else "data_dir": subset}
    return datasets.load_dataset(name, split=split, **where)


def _line(error: Exception) -> str:
    """The library's message on one line, and not a page of it."""
    return " ".join(str(error).split())[:300]
