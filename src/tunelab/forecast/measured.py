"""What a run foretold beside what it measured: `forecast_and_measured` of run.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def beside_measured(forecast: Mapping[str, Any], cost: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`forecast` of `run_forecast` and `cost` of run.json by name, each {"forecast", "measured"}; None is not known.

    peak_memory_bytes: of the process on a CPU, of the tensors on a card. tokens, flops, floor_flops: of the whole run,
    so that one which ended early measures less. seconds: foretold where the machine was calibrated.
    checkpoint_bytes: of one.
    """
    pairs = {
        "peak_memory_bytes": (forecast["memory"]["peak_bytes"], cost["peak_memory_bytes"]),
        "tokens": (forecast["counts"]["tokens"], cost["tokens"]),
        "flops": (forecast["compute"]["flops"], cost["flops"]),
        "floor_flops": (forecast["compute"]["floor_flops"], cost["floor_flops"]),
        "seconds": (forecast["time"]["seconds"], cost["seconds"]["total"]),
        "checkpoint_bytes": (forecast["disk"]["checkpoint_bytes"], cost["checkpoint_bytes"]),
    }
    return {name: {"forecast": foretold, "measured": measured} for name, (foretold, measured) in pairs.items()}
