"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from tunelab.errors import ConfigError

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """`15GB`, `15.5 GiB`, `800mb` → bytes: GB is 10⁹, GiB 2³⁰. Raises ConfigError for anything else."""
    found = _SIZE.fullmatch(text)
    unit = found[2].upper() if found else ""
    if found is None or unit not in UNITS or not float(found[1]):
        hint = f"; did you mean {found[1]}GB?" if found is not None and not unit and float(found[1]) else ""
        raise ConfigError(f"--memory: '{text}' is no amount of memory; write 15GB, 16GiB or 800MB{hint}")
    return round(float(found[1]) * UNITS[unit])
