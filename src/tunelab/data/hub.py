"""Data sets of the Hugging Face hub, through the optional `datasets` library."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tunelab.data.reading import Row
from tunelab.errors import DataError, MachineError
from tunelab.types import Origin

OFFLINE_MEND = "a local file or folder, or builtin:helpful-mini, works without it"


def load_rows(name: str, split: str, subset: str | None) -> tuple[str, list[Row]]:
    """(SHA-256 over the rows as JSON, rows) of one split. `subset`: one of the configurations, else a `data_dir`.

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
    digest = hashlib.sha256()
    rows: list[Row] = []
    shown = f"{name}/{subset}[{split}]" if subset else f"{name}[{split}]"
    for number, values in enumerate(table, start=1):
        digest.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")
        rows.append((Origin(shown, number), values))
    return digest.hexdigest(), rows


def _load(datasets: Any, name: str, split: str, subset: str | None) -> Any:
    where: dict[str, str] = {}
    if subset is not None:
        where = {"name" if subset in datasets.get_dataset_config_names(name) else "data_dir": subset}
    return datasets.load_dataset(name, split=split, **where)


def _line(error: Exception) -> str:
    """The library's message on one line, and not a page of it."""
    return " ".join(str(error).split())[:300]
