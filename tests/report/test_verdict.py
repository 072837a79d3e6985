"""The sentences say what the intervals show, and nothing else."""

from __future__ import annotations

import pytest

from tests.report.synthetic import interval
from tunelab.report.verdict import describe_difference, judge, tone_of

COMPLETED = {"name": "x", "status": "completed", "data": {"eval": {"records": 200}}}


def difference(value, low, high, n=200):
    return {"value": value, "low": low, "high": high, "n": n}


def evaluation(*arms, differences=(), n=200):
    """arms: (name, {metric: value}); differences: (metric, from, to, value, half-width)."""
    return {
        "num_records": n,
        "confidence": 0.95,
        "arms": [
            {"name": name, "metrics": {m: interval(v, 0.05, n) for m, v in values.items()}} for name, values in arms
        ],
        "differences": [
            {"metric": metric, "from": start, "to": end, **interval(value, width, n)}
            for metric, start, end, value, width in differences
        ],
    }


def test_the_sentence_of_a_fall():
    assert describe_difference("eval/nll", 2.41, 2.13, difference(-0.28, -0.31, -0.25), 0.95) == (
        "held-out loss fell from 2.41 to 2.13 (difference −0.28, 95% interval −0.31 to −0.25, 200 records)"
    )


def test_percentages_are_told_in_points():
    assert describe_difference("preference/accuracy", 0.52, 0.615, difference(0.095, 0.03, 0.16), 0.9) == (
        "held-out likelihood accuracy rose from 52.0% to 61.5% "
        "(difference +9.5 points, 90% interval +3.0 to +16.0, 200 pairs)"
    )


@pytest.mark.parametrize(
    ("metric", "low", "high", "n", "tone"),
    [
        ("eval/nll", -0.3, -0.1, 200, "better"),
        ("eval/nll", 0.1, 0.3, 200, "worse"),
        ("eval/nll", -0.1, 0.3, 200, "none"),
        ("eval/nll", -0.3, 0.0, 200, "none"),  # an end at zero does not leave zero out
        ("preference/accuracy", 0.1, 0.3, 200, "better"),
        ("preference/accuracy", -0.3, -0.1, 200, "worse"),
        ("preference/accuracy", 0.1, 0.3, 9, "none"),  # too few to claim
        ("preference/accuracy", 0.1, 0.3, 10, "better"),
        ("my/metric", 0.1, 0.3, 200, "none"),  # no direction known
    ],
)
def test_tone(metric, low, high, n, tone):
    assert tone_of(metric, difference((low + high) / 2, low, high, n)) == tone


def test_an_interval_that_holds_zero_shows_nothing():
    text = describe_difference("eval/nll", 2.41, 2.40, difference(-0.01, -0.04, 0.02), 0.95)
    assert text.startswith("no difference shown in held-out loss: 2.41 before and 2.40 after")
    assert "fell" not in text


def test_few_records_make_no_claim():
    text = describe_difference("eval/nll", 2.4, 2.1, difference(-0.3, -0.4, -0.2, n=4), 0.95)
    assert text.startswith("too few records to judge held-out loss")


def test_two_arms_of_a_supervised_run():
    found = judge(
        COMPLETED,
        evaluation(
            ("base", {"eval/nll": 2.41}),
            ("sft", {"eval/nll": 2.13}),
            differences=[("eval/nll", "base", "sft", -0.28, 0.03)],
        ),
        [],
        ["sft"],
    )
    assert found.tone == "better"
    assert found.sentences == (
        "Held-out loss fell from 2.41 to 2.13 (difference −0.28, 95% interval −0.31 to −0.25, 200 records).",
    )


def test_each_stage_is_judged_by_its_own_aim_and_its_price_is_told():
    values = ({"eval/nll": 2.41, "preference/accuracy": 0.5}, {"eval/nll": 2.13, "preference/accuracy": 0.5})
    found = judge(
        COMPLETED,
        evaluation(
            ("base", values[0]),
            ("sft", values[1]),
            ("dpo", {"eval/nll": 2.23, "preference/accuracy": 0.6}),
            differences=[
                ("eval/nll", "base", "sft", -0.28, 0.03),
                ("eval/nll", "sft", "dpo", 0.1, 0.03),
                ("eval/perplexity", "sft", "dpo", 1.0, 0.3),
                ("preference/accuracy", "sft", "dpo", 0.1, 0.04),
                ("preference/margin", "sft", "dpo", 0.1, 0.04),
            ],
        ),
        [],
        ["sft", "dpo"],
    )
    assert [s.split(" (")[0] for s in found.sentences] == [
        "From base to sft, held-out loss fell from 2.41 to 2.13",
        "From sft to dpo, held-out likelihood accuracy rose from 50.0% to 60.0%",
        "At the same time held-out loss rose from 2.13 to 2.23",
    ]
    assert found.tone == "better"


def test_arms_without_paired_differences_are_not_compared():
    found = judge(COMPLETED, evaluation(("base", {"eval/nll": 2.4}), ("sft", {"eval/nll": 2.1})), [], ["sft"])
    assert found.sentences == ("Base and sft were not compared on the same records.",)
    assert found.tone == "none"


def test_one_arm():
    found = judge(COMPLETED, evaluation(("base", {"eval/nll": 2.4})), [], ["sft"])
    assert found.sentences == (
        "Held-out loss is 2.40 (95% interval 2.35 to 2.45, 200 records); nothing was evaluated beside it.",
    )


def test_training_evaluations_are_reported_without_a_claim():
    rows = [{"step": 0, "eval/loss": 2.5}, {"step": 50, "eval/loss": 2.1}, {"step": 100, "eval/loss": 2.2}]
    record = COMPLETED | {"best": {"step": 50, "eval/loss": 2.1}}
    found = judge(record, None, rows, ["sft"])
    assert found.tone == "none"
    assert found.sentences == (
        "On the held-out sample watched during training the loss went from 2.500 (step 0) to 2.200 (step 100), "
        "2.100 at the kept step 50; `tunelab evaluate x` measures it with intervals.",
    )


@pytest.mark.parametrize("rows", [[], [{"step": 3, "eval/loss": float("nan")}], [{"step": 3}]])
def test_nothing_measured_is_said(rows):
    found = judge({"name": "x", "status": "completed"}, None, rows, ["sft"])
    assert found.sentences == (
        "No held-out evaluation was made, so nothing is shown; "
        "`tunelab evaluate x --data FILE` measures it with intervals.",
    )


@pytest.mark.parametrize(
    ("status", "error", "opening"),
    [
        ("failed", "out of\nmemory.", "This run failed (out of memory)."),
        ("interrupted", None, "This run was interrupted and can be resumed; what follows is what it had reached."),
        ("running", None, "This run had not finished when this page was written."),
        ("diverged", None, "This run diverged: its loss or gradient stopped being finite."),
    ],
)
def test_an_unfinished_run_says_so_first(status, error, opening):
    assert judge({"name": "x", "status": status, "error": error}, None, [], ["sft"]).sentences[0] == opening
