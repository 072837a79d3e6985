"""The frontier's arithmetic, its search, its plot, and a trial of a tiny model from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.frontier import study, trial, write
from benchmarks.frontier.arms import ARMS
from benchmarks.frontier.figure import Point, draw_frontier
from benchmarks.frontier.summary import points, summarise, table
from benchmarks.frontier.trial import Task, run_trial, storage_bytes
from tunelab.models.tiny import build_tiny_tokenizer


def _run(loss: float | None, seed: int = 0, rate: float = 1e-3, state: float = 8.0) -> dict[str, Any]:
    memory = {"weights": 4.0, "gradients": 4.0, "state": state}
    return {
        "loss": loss,
        "seed": seed,
        "learning_rate": rate,
        "bytes_per_parameter": memory,
        "task": "tune",
        "arm": "x",
        "seconds": 1.0,
    }


def test_losses_are_set_against_adamw_with_the_same_seed() -> None:
    studies = {
        "adamw": {"runs": [_run(2.0, 0), _run(4.0, 1)], "search": []},
        "quarter": {"runs": [_run(2.02, 0, state=1.0), _run(3.96, 1, state=1.0)], "search": [_run(2.5)]},
        "sgd": {"runs": [_run(None, 0), _run(3.0, 1)], "search": []},
    }
    rows = {row["arm"]: row for row in summarise(studies, untrained=6.0)}
    assert list(rows) == ["quarter", "adamw", "sgd"]  # the leanest first
    excess = rows["quarter"]["excess"]
    assert (excess["low"], excess["mean"], excess["high"]) == pytest.approx((-1.0, 0.0, 1.0))
    assert rows["quarter"]["gain"] == pytest.approx((3.98 / 4 + 2.04 / 2) / 2)
    assert "excess" not in rows["sgd"]
    text = table(list(rows.values()))
    assert "| SGD | 4.00 + 4.00 + 8.00 = 16.00 | 0.001 | diverged |" in text
    assert "4.00 + 4.00 + 1.00 = 9.00" in text
    assert [point.label for point in points(list(rows.values()))] == ["quarter", "AdamW"]


def test_only_what_is_within_four_bytes_and_one_percent_is_bold() -> None:
    def bold(total: float, loss: float) -> bool:
        run = _run(loss)
        run["bytes_per_parameter"] = {"weights": 2.0, "gradients": 0.5, "state": total - 2.5}
        studies = {"adamw": {"runs": [_run(2.0)], "search": []}, "quarter": {"runs": [run], "search": []}}
        return "**quarter**" in table(summarise(studies, untrained=3.0))

    assert bold(3.9, 2.01)
    assert not bold(4.1, 2.01)
    assert not bold(3.9, 2.03)


@pytest.mark.parametrize(("optimum", "most"), [(1e-3, 3), (3e-2, 6), (1e-5, 7)])
def test_the_search_goes_on_past_its_ends(
    optimum: float, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A parabola in the logarithm of the rate; a rate ten times too large diverges."""
    tried: list[tuple[float, int]] = []

    def fake(task: Task, arm: Any, rate: float, seed: int, work: Path) -> dict[str, Any]:
        tried.append((rate, seed))
        loss = None if rate > 10 * optimum else 2 + math.log10(rate / optimum) ** 2 + 0.01 * seed
        return _run(loss, seed, rate)

    monkeypatch.setattr(study, "run_trial", fake)
    task = Task("tune", "", "answers", 5, 2, 64, 4)
    found = study.study_arm(task, "adamw", 1e-3, [0, 1, 2], tmp_path)
    best = found["runs"][0]["learning_rate"]
    assert abs(math.log10(best / optimum)) < 0.26
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
    assert len({rate for rate, _ in tried}) <= most
    count = len(tried)
    assert study.study_arm(task, "adamw", 1e-3, [0, 1, 2], tmp_path) == found
    assert len(tried) == count  # from the files


def test_every_label_of_a_crowded_plot_is_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    crowd = [
        Point(arm.label, arm.family, float(random.choice([8, 12, 16])), float(y), float(y) - 0.2, float(y) + 0.2)
        for arm, y in zip(ARMS.values(), random.normal(size=len(ARMS)), strict=True)
    ]
    path = tmp_path / "plot.svg"
    draw_frontier([*crowd, Point("far off", "lean", 8.0, 40.0, 40.0, 40.0)], path, "title")
    first = path.read_bytes()
    draw_frontier([*crowd, Point("far off", "lean", 8.0, 40.0, 40.0, 40.0)], path, "title")
    assert path.read_bytes() == first


def test_the_page_keeps_what_stands_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{write.START}\nold\n{write.END}\nafter\n")
    rows = summarise({"adamw": {"runs": [_run(2.0)], "search": []}}, untrained=3.0)
    result = {"title": "a task", "task": "tune", "steps": 5, "tokens": 1000, "untrained_loss": 3.0, "rows": rows}
    write.update_page(page, [result])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "### A task, 5 steps, 1,000 tokens" in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="missing"):
        write.update_page(page, [result])


def test_storages_are_counted_once() -> None:
    whole = torch.zeros(10)
    assert storage_bytes([whole, whole[:5], torch.zeros(3, dtype=torch.int8)]) == 43


@pytest.fixture
def tiny_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pairs = [
        {"chosen": f"\n\nHuman: say {n}\n\nAssistant: {n} it is", "rejected": f"\n\nHuman: say {n}\n\nAssistant: no"}
        for n in range(20)
    ]
    import gzip

    with gzip.open(data / "test.jsonl.gz", "wt") as sink:
        sink.write("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setattr("benchmarks.frontier.base.DATA", data)
    monkeypatch.setattr(trial, "HELD_OUT", 4)
    trial._data.cache_clear()


@pytest.mark.usefixtures("tiny_data")
@pytest.mark.parametrize("name", ["adamw", "quarter"])
def test_a_trial_learns_and_counts_its_bytes(name: str, tmp_path: Path) -> None:
    task = Task("tune", "tiny-gpt2", "answers", steps=6, records=4, max_length=64, held_out=4)
    result = run_trial(task, ARMS[name], 3e-3, 0, tmp_path)
    assert result["loss"] < trial.untrained_loss(task, ARMS[name], tmp_path)
    memory = result["bytes_per_parameter"]
    if name == "adamw":
        assert memory["weights"] == memory["gradients"] == 4.0
        assert memory["state"] == pytest.approx(8.0, abs=0.01)
    else:
        vocabulary = len(build_tiny_tokenizer()) * 64 / result["parameters"]  # the tied embedding's share
        assert memory["weights"] == 2.0
        assert 2 * vocabulary < memory["gradients"] < 2 * vocabulary + 0.4
        assert 1.0 < memory["state"] < 1.4
    again = run_trial(task, ARMS[name], 3e-3, 0, tmp_path)
    assert again["loss"] == result["loss"]
    assert run_trial(task, replace(ARMS[name]), 3e-3, 1, tmp_path)["loss"] != result["loss"]
