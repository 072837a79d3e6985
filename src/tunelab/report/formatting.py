"""Numbers as a person reads them: a true minus sign, thin grouping, units, and never more digits than are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"
NBSP = "\N{NO-BREAK SPACE}"
"""Between a number and its unit, so that no line breaks there."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fixed(value: float, decimals: int = 2) -> str:
    """`value` to a fixed number of decimals; what rounds to zero carries no sign."""
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", MINUS)


def signed(value: float, decimals: int = 2) -> str:
    """`fixed` with a plus sign for what is above zero after rounding."""
    text = fixed(value, decimals)
    return text if text.startswith(MINUS) or not any(c in "123456789" for c in text) else f"+{text}"


def decimals_for(low: float, high: float, least: int = 2, most: int = 5) -> int:
    """Decimals that show an interval's half-width to one figure, and do not round an end that is not zero to zero."""
    half_width = (high - low) / 2.0
    decimals = least if half_width <= 0 else max(least, -math.floor(math.log10(half_width)))
    while decimals < most and any(end != 0 and abs(end) < 0.5 * 10**-decimals for end in (low, high)):
        decimals += 1
    return min(decimals, most)


def count(value: float) -> str:
    """A whole number with its thousands grouped: 12,345."""
    return f"{value:,.0f}".replace("-", MINUS)


def short_count(value: float) -> str:
    """Three significant figures with a unit: 845, 12.3 k, 1.04 M, 3.2 B."""
    for least, scale, unit in ((999.5e9, 1e12, "T"), (999.5e6, 1e9, "B"), (999.5e3, 1e6, "M"), (9999.5, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / scale:.3g}{NBSP}{unit}"
    return count(value)


def scientific(value: float, digits: int = 2) -> str:
    """Powers of ten as in print: 1.2 × 10¹⁴."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.replace('-', MINUS)}{NBSP}×{NBSP}10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def duration(seconds: float) -> str:
    """0.42 s, 12 s, 3 min 5 s, 2 h 14 min."""
    if seconds < 9.95:
        return f"{seconds:.2g}{NBSP}s" if seconds else f"0{NBSP}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60}{NBSP}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def memory(num_bytes: float) -> str:
    """Binary units: 3.4 GiB, 512 MiB."""
    gib = num_bytes / 2**30
    return f"{gib:.1f}{NBSP}GiB" if gib >= 1 else f"{num_bytes / 2**20:.0f}{NBSP}MiB"


def percent(fraction: float, decimals: int = 1) -> str:
    return f"{fixed(100.0 * fraction, decimals)}%"


def number(value: float) -> str:
    """A number of unknown meaning: integers grouped, others to four significant figures."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e15):
        return count(value)
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return scientific(value, 3)
    return f"{value:,.4g}".replace("-", MINUS)


def plain(value: Any) -> str:
    """Any JSON scalar as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else str(value)


def humanise(key: str) -> str:
    """`prompt_cut` → `Prompt cut`."""
    words = key.replace("_", " ").replace("/", " ").strip()
    return words.upper() if words in ("cpu", "gpu") else words[:1].upper() + words[1:]


def join_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
