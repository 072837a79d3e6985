"""How fast a run was, as a line for people."""

from __future__ import annotations

import pytest

from tunelab.cli.output import format_speed


@pytest.mark.parametrize(
    ("cost", "line"),
    [
        (
            {"tokens_per_second": 1234.6, "utilisation": 0.884, "matmul_ceiling_flops_per_second": 2.013e11},
            "1,235 tokens/s, 88% of this machine's matmul ceiling (201 GFLOP/s)",
        ),
        ({"tokens_per_second": 1234.6}, "1,235 tokens/s"),  # a run of before there was a floor
        ({"tokens_per_second": 0.0, "utilisation": None, "matmul_ceiling_flops_per_second": 2e11}, ""),
        ({}, ""),
    ],
)
def test_speed(cost: dict[str, float | None], line: str) -> None:
    assert format_speed(cost) == line
