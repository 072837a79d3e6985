"""Tables render records by shape."""

from __future__ import annotations

import dataclasses

from tests.report.synthetic import cost, data_summary, forecast_and_measured, interval
from tunelab.data.summary import DataSummary, Lengths, Listed
from tunelab.report import tables
from tunelab.report.formatting import NBSP


def as_dict(table):
    return {row[0].text: [cell.text.replace(NBSP, " ") for cell in row[1:]] for row in table.rows}


def test_cost_adds_up_but_for_peaks_and_rates():
    second = cost(80) | {
        "peak_memory_bytes": 5 * 2**30,
        "judge_calls": 12,
        "utilisation": 0.31,
        "matmul_ceiling_flops_per_second": 2e11,
    }
    table = tables.cost_table([("sft", cost(120)), ("dpo", second)])
    rows = as_dict(table)
    assert table.columns == ("", "sft", "dpo", "total")
    assert rows["Tokens trained on"] == ["216,000", "144,000", "360,000"]
    assert rows["Time: total"] == ["2 min 2 s", "2 min 2 s", "4 min 4 s"]
    assert rows["Peak memory"] == ["3.2 GiB", "5.0 GiB", "5.0 GiB"]
    assert rows["Tokens per second of training"] == ["2,269", "1,513", "–"]
    assert rows["FLOPs that cannot be left out"] == ["1.2 × 10¹⁴", "8.0 × 10¹³", "2.0 × 10¹⁴"]
    assert rows["Matmul ceiling of the machine, FLOP/s"] == ["–", "2.0 × 10¹¹", "–"]
    assert rows["Utilisation of that ceiling"] == ["–", "31.0%", "–"]
    assert rows["Judge calls"] == ["–", "12", "12"]
    assert "Step" not in rows
    times = [name for name in rows if name.startswith("Time")]
    assert times == ["Time: loading", "Time: training", "Time: evaluation", "Time: checkpoint", "Time: total"]


def test_one_stage_has_no_total_and_no_cost_no_table():
    assert tables.cost_table([("sft", cost(3))]).columns == ("", "sft")
    assert tables.cost_table([("sft", {})]) is None


def test_forecast_beside_measured():
    record = {"status": "completed", "forecast_and_measured": forecast_and_measured(120)}
    table = tables.forecast_table(record, "Stage 1: sft")
    assert table.caption == "Forecast before the run, and measured, Stage 1: sft"
    assert table.columns == ("", "forecast", "measured", "forecast off by")
    rows = as_dict(table)
    assert rows["Peak memory"] == ["3.1 GiB", "3.2 GiB", "−3.1%"]
    assert rows["Time"] == ["2 min 17 s", "2 min 2 s", "+12.0%"]
    assert rows["Tokens trained on"] == ["216,000", "216,000", "0.0%"]
    assert rows["A checkpoint on disk"] == ["1.5 GiB", "1.5 GiB", "0.0%"]


def test_sums_of_a_run_that_did_not_finish_are_not_held_against_its_forecast():
    record = {"status": "interrupted", "forecast_and_measured": forecast_and_measured(120)}
    assert list(as_dict(tables.forecast_table(record))) == ["Peak memory", "A checkpoint on disk"]


def test_what_was_not_foretold_or_not_measured_has_no_row():
    some = {"peak_memory_bytes": {"forecast": None, "measured": 5}, "tokens": {"forecast": 8, "measured": 8}}
    assert list(as_dict(tables.forecast_table({"status": "completed", "forecast_and_measured": some}))) == [
        "Tokens trained on"
    ]
    assert tables.forecast_table({"status": "completed", "forecast_and_measured": None}) is None
    assert tables.forecast_table({"status": "completed"}) is None


def test_data_by_shape():
    many = {"count": 70, "origins": [f"f:{i}" for i in range(50)]}
    train = data_summary("train", "dpo", dropped=2) | {"prompts_cut": many, "new_field": ["a", "b", "c", "d", "e"]}
    found, listings = tables.data_tables({"train": train, "eval": None})
    records, lengths = found
    rows = as_dict(records)
    assert records.columns == ("", "train")
    assert rows["Used"] == ["398"]
    assert rows["Dropped"] == ["2"]
    assert rows["Prompts cut"] == ["70"]
    assert rows["Ignored columns"] == ["id"]
    assert rows["Padding avoided"] == ["41.2%"]
    assert lengths.caption == "Tokens per record"
    assert lengths.columns == ("", "p5", "p50", "p95", "mean", "max")
    assert as_dict(lengths)["chosen, train"] == ["12", "58.5", "161", "70.3", "233"]
    assert [(x.title, x.count, len(x.items)) for x in listings] == [
        ("Dropped, train", 2, 2),
        ("Prompts cut, train", 70, 50),
        ("New field, train", 5, 5),
    ]


def test_the_data_rooms_own_summary_is_shown_in_full():
    """The real DataSummary: a field of a shape we cannot render, or a renamed one, fails here."""
    listed = Listed(1, ("train.jsonl:4",))
    values = {"str": "text", "int": 7, "float": 0.5, "Listed": listed, "tuple[str, ...]": ("a", "b")}
    lengths = {"prompt": Lengths(1, 2, 3, 2, 4), "total": Lengths(1, 2, 3, 2, 4)}
    fields = dataclasses.fields(DataSummary)
    summary = DataSummary(**{f.name: values.get(str(f.type), lengths) for f in fields}).to_json()
    found, listings = tables.data_tables({"train": summary, "eval": summary})
    shown = as_dict(found[0])
    assert len(shown) + 1 == len(fields)
    assert shown["Dropped"] == ["1", "1"]
    assert as_dict(found[1])["prompt, train"] == ["1", "2", "3", "2", "4"]
    assert {x.items for x in listings} == {("train.jsonl:4",)}


def test_evaluation_tables():
    accuracy = interval(0.5, 0.1, 40)
    evaluation = {
        "confidence": 0.95,
        "arms": [
            {
                "name": "base",
                "metrics": {"eval/nll": interval(2.4, 0.08, 40), "preference/accuracy": accuracy},
            },
            {"name": "sft", "metrics": {"eval/nll": interval(2.1, 0.004, 40)}},
        ],
        "differences": [
            {"metric": "eval/nll", "from": "base", "to": "sft", **interval(-0.3, 0.02, 40)},
            {"metric": "preference/accuracy", "from": "base", "to": "sft", **interval(0.01, 0.02, 40)},
        ],
    }
    own = tables.metric_table(evaluation)
    assert own.columns == ("", "base", "sft")
    assert as_dict(own)["Held-out loss"] == ["2.400", "2.100"]  # one row, one precision: that of the narrowest
    assert as_dict(own)["Held-out likelihood accuracy"] == ["50.0%", "–"]
    change = tables.difference_table(evaluation)
    assert change.caption == "Differences on the same 40 records, with 95% intervals"
    assert change.columns == ("", "base → sft")
    cells = [row[1] for row in change.rows]
    assert [(c.text, c.note, c.tone) for c in cells] == [
        ("−0.30", "−0.32 to −0.28, better", "better"),
        ("+1.0", "−1.0 to +3.0, not shown", "none"),
    ]
    assert tables.difference_table({**evaluation, "differences": []}) is None
