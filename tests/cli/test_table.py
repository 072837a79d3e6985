"""Tables that fit, and the forms of numbers."""

from __future__ import annotations

import json

import pytest
from rich.cells import cell_len

from tunelab.cli.output import format_interval, print_json
from tunelab.cli.table import format_table

ROWS = [["a-rather-long-run-name", "sft", "completed", "6.49"], ["b", "dpo", "failed", "0.4107"]]
COLUMNS = ["name", "method", "status", "loss"]


def test_aligned_text_to_the_left_numbers_to_the_right() -> None:
    assert format_table(COLUMNS, ROWS, None) == [
        "name                    method  status       loss",
        "a-rather-long-run-name  sft     completed    6.49",
        "b                       dpo     failed     0.4107",
    ]


def test_the_widest_column_is_cut() -> None:
    """49 columns wide; 9 less are wanted, and the name is the widest down to 13."""
    lines = format_table(COLUMNS, ROWS, 40)
    assert [cell_len(line) for line in lines] == [40, 40, 40]
    assert lines[1] == "a-rather-lon…  sft     completed    6.49"


def test_droppable_columns_go_first_and_in_order() -> None:
    """Without status (9 and a gap) it is 38 wide; without method (6 and a gap) also 30."""
    assert format_table(COLUMNS, ROWS, 40, ["status", "method"])[0] == "name                    method    loss"
    assert format_table(COLUMNS, ROWS, 37, ["status", "method"])[0] == "name                      loss"
    assert format_table(COLUMNS, ROWS, 80, ["status", "method"])[0].split() == COLUMNS


@pytest.mark.parametrize("width", [10, 30, 60])
def test_wide_characters_count_double(width: int) -> None:
    lines = format_table(["name", "x"], [["数据" * 10, "y"], ["a", "y"]], width)
    assert max(map(cell_len, lines)) <= width
    assert lines[1].endswith("y")
    assert lines[2].endswith("y")
    assert cell_len(lines[1]) == cell_len(lines[2])


def test_cells_are_one_line() -> None:
    assert format_table(["a"], [["x\ny"]], None) == ["a", "x y"]


def test_no_rows() -> None:
    assert format_table(["a", "b"], [], None) == ["a  b"]


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        # half-width 0.03: two decimals; half-width 0.004: three; above 100: as many as 1 of half-width needs, none
        (6.489, 6.464, 6.512, "6.49 [6.46, 6.51]"),
        (0.5, 0.496, 0.504, "0.500 [0.496, 0.504]"),
        (1039.2, 1025.982, 1051.083, "1,039 [1,026, 1,051]"),
        (-0.25, -0.5, 0.0, "−0.25 [−0.50, 0.00]"),
    ],
)
def test_intervals(value: float, low: float, high: float, text: str) -> None:
    assert format_interval({"value": value, "low": low, "high": high}) == text


def test_changes_carry_their_sign() -> None:
    assert format_interval({"value": 0.25, "low": -0.1, "high": 0.6}, signed=True) == "+0.25 [−0.10, +0.60]"


def test_json_is_one_object_that_any_parser_takes(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "nested": [{"x": float("inf")}], "name": "é"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"schema_version": 1, "loss": None, "nested": [{"x": None}], "name": "é"}
    assert out.endswith("}\n")
