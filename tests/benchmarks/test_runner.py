"""Interleaving and resuming, with processes that only say that they ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import runner
from benchmarks.jobs import Job
from benchmarks.runner import ArmFailed, Runner, run_job

OURS = Job("sft", "tunelab", "model", "examples", 8, 2, 1)
THEIRS = Job("sft", "trl", "model", "examples", 8, 2, 1)


class Processes:
    """Stands in for `run_job`: notes the sides, and fails at the n-th."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.sides: list[str] = []
        self.fails_at = fails_at

    def __call__(self, job: Job, result: Path, work: Path) -> None:
        self.sides.append(job.side)
        if len(self.sides) == self.fails_at:
            raise KeyboardInterrupt
        result.write_text(json.dumps({"step_seconds": [1.0], "number": len(self.sides)}))


def make_runner(tmp_path: Path, session: str = "one", reuse_peer: bool = False) -> Runner:
    return Runner(tmp_path, tmp_path / "sessions" / session, total=7, reuse_peer=reuse_peer)


def test_each_of_theirs_runs_between_two_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes()
    monkeypatch.setattr(runner, "run_job", processes)
    ours, theirs = make_runner(tmp_path).interleave(OURS, THEIRS, repeats=3)
    assert processes.sides == ["tunelab", "trl"] * 3 + ["tunelab"]
    assert [run["number"] for run in ours] == [1, 3, 5, 7]
    assert [run["number"] for run in theirs] == [2, 4, 6]


def test_a_killed_benchmark_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_job", Processes(fails_at=4))
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path).interleave(OURS, THEIRS, repeats=3)
    rest = Processes()
    monkeypatch.setattr(runner, "run_job", rest)
    resumed = make_runner(tmp_path)
    ours, theirs = resumed.interleave(OURS, THEIRS, repeats=3)
    assert rest.sides == ["trl", "tunelab", "trl", "tunelab"]
    assert (len(ours), len(theirs), resumed.done) == (4, 3, 7)


def test_only_the_peer_is_taken_from_another_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_job", Processes())
    make_runner(tmp_path, "one").interleave(OURS, THEIRS, repeats=1)
    again = Processes()
    monkeypatch.setattr(runner, "run_job", again)
    _, theirs = make_runner(tmp_path, "two", reuse_peer=True).interleave(OURS, THEIRS, repeats=1)
    assert again.sides == ["tunelab", "tunelab"]
    assert theirs[0]["reused_from_another_session"]
    make_runner(tmp_path, "three").interleave(OURS, THEIRS, repeats=1)
    assert again.sides == ["tunelab", "tunelab", "tunelab", "trl", "tunelab"]


def test_a_side_that_dies_is_quoted(tmp_path: Path) -> None:
    """There is no such folder of a model: the process says so on its way out."""
    missing = Job("sft", "tunelab", str(tmp_path / "missing"), str(tmp_path / "none.jsonl"), 8, 2, 1)
    with pytest.raises(ArmFailed, match=r"tunelab \(sft\) ended with status 1[\s\S]*none\.jsonl"):
        run_job(missing, tmp_path / "result.json", tmp_path)
    assert not (tmp_path / "result.json").exists()
