"""Numbers as text; expected strings are written out by hand."""

from __future__ import annotations

import pytest

from tunelab.report import formatting
from tunelab.report.formatting import NBSP


@pytest.mark.parametrize(
    ("value", "decimals", "plain", "signed"),
    [
        (2.415, 2, "2.42", "+2.42"),
        (-0.28, 2, "−0.28", "−0.28"),
        (-0.001, 2, "0.00", "0.00"),  # no minus nought
        (0.004, 2, "0.00", "0.00"),
        (12345.6, 1, "12,345.6", "+12,345.6"),
        (-1000, 0, "−1,000", "−1,000"),
    ],
)
def test_fixed_and_signed(value, decimals, plain, signed):
    assert formatting.fixed(value, decimals) == plain
    assert formatting.signed(value, decimals) == signed


@pytest.mark.parametrize(
    ("low", "high", "decimals"),
    [
        (-0.31, -0.25, 2),  # half-width 0.03: two decimals show it
        (2.1, 2.5, 2),  # never fewer than two
        (0.010, 0.016, 3),  # half-width 0.003
        (-0.031, 0.003, 3),  # 0.003 must not be written as nought
        (0.0, 0.04, 2),  # an exact nought may
        (1.0, 1.0, 2),
        (1e-9, 2e-9, 5),  # never more than five
    ],
)
def test_decimals_follow_the_interval(low, high, decimals):
    assert formatting.decimals_for(low, high) == decimals


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (formatting.short_count, 845, "845"),
        (formatting.short_count, 9_999, "9,999"),
        (formatting.short_count, 134_515_008, "135 M"),
        (formatting.short_count, 12_345, "12.3 k"),
        (formatting.short_count, 999_999, "1 M"),
        (formatting.scientific, 2.56e14, "2.6 × 10¹⁴"),
        (formatting.scientific, 3e-5, "3.0 × 10⁻⁵"),
        (formatting.scientific, 0, "0"),
        (formatting.duration, 0.4213, "0.42 s"),
        (formatting.duration, 9.96, "10 s"),
        (formatting.duration, 59.6, "1 min 0 s"),
        (formatting.duration, 3599.7, "1 h 0 min"),
        (formatting.duration, 8_045, "2 h 14 min"),
        (formatting.memory, 3.2 * 2**30, "3.2 GiB"),
        (formatting.memory, 512 * 2**20, "512 MiB"),
        (formatting.percent, 0.6149, "61.5%"),
        (formatting.number, 58.5, "58.5"),
        (formatting.number, 1e-7, "1.00 × 10⁻⁷"),
        (formatting.plain, None, "–"),
        (formatting.plain, True, "yes"),
        (formatting.humanise, "prompts_cut", "Prompts cut"),
        (formatting.humanise, "cpu", "CPU"),
    ],
)
def test_units(function, value, text):
    assert function(value).replace(NBSP, " ") == text
