"""The run folder: atomic creation, rewinding, locking, lineage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunelab.config import Recipe, parse_recipe
from tunelab.errors import ConfigError, MachineError, TunelabError
from tunelab.runs import RunFolder, lineage, list_runs


def recipe(root: Path, name: str | None = "a", model: str = "tiny-gpt2") -> Recipe:
    return parse_recipe(
        {
            "model": {"name": model},
            "data": {"train": "builtin:helpful-mini"},
            "method": {"name": "sft"},
            "training": {"output_dir": str(root), "run_name": name},
        }
    )


def test_a_run_holds_the_recipe_it_was_made_from(tmp_path: Path) -> None:
    run = RunFolder.create(recipe(tmp_path))
    assert run.recipe() == recipe(tmp_path)
    assert run.record()["fingerprint"] == recipe(tmp_path).fingerprint()
    assert run.record()["status"] == "created"
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


def test_a_taken_name_is_refused_and_a_generated_one_is_free(tmp_path: Path) -> None:
    RunFolder.create(recipe(tmp_path))
    with pytest.raises(ConfigError, match=r"training.run_name: .*/a exists; choose another name, or continue it"):
        RunFolder.create(recipe(tmp_path))
    names = {RunFolder.create(recipe(tmp_path, None)).name for _ in range(3)}
    assert len(names) == 3


def test_a_kill_while_creating_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_record", die)
        with pytest.raises(Killed):
            RunFolder.create(recipe(tmp_path))
    assert list_runs(tmp_path) == []
    assert RunFolder.create(recipe(tmp_path)).name == "a"


def test_an_output_dir_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"training.output_dir: cannot create .*file/a"):
        RunFolder.create(recipe(tmp_path / "file"))


def test_rewinding_forgets_what_will_be_written_again(tmp_path: Path) -> None:
    """A stop during the evaluation after step 4 saved step 4 with evaluation 2 as its last."""
    run = RunFolder.create(recipe(tmp_path))
    for step in range(1, 7):
        run.log_metrics(step, "train", {"train/loss": 1.0})
        if step % 2 == 0:
            run.log_metrics(step, "eval", {"eval/loss": 1.0})
            run.log_sample(step, "p", "c", None)
    run.rewind(4, evaluated=2)
    assert [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4]
    assert [row["step"] for row in run.metrics("eval")] == [2]
    assert [row["step"] for row in run.samples()] == [2]


def test_a_line_cut_short_by_a_kill_is_left_out_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    run = RunFolder.create(recipe(tmp_path))
    run.log_metrics(1, "train", {"train/loss": 1.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "pha')
    assert [row["step"] for row in run.metrics()] == [1]
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 3, "phase": "train"}\n')
    with pytest.raises(json.JSONDecodeError):
        run.metrics()


def test_one_process_trains_a_run(tmp_path: Path) -> None:
    run = RunFolder.create(recipe(tmp_path))
    program = (
        "import sys, pathlib\n"
        "from tunelab.errors import ConfigError\n"
        "from tunelab.runs import RunFolder\n"
        "try:\n"
        "    with RunFolder(pathlib.Path(sys.argv[1])).locked(): print('locked')\n"
        "except ConfigError as error: print(error)\n"
    )

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-c", program, str(run.path)], capture_output=True, text=True, check=True
        ).stdout

    with run.locked():
        assert "another process is training this run" in other()
    assert other() == "locked\n"


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run = RunFolder.create(recipe(tmp_path))
    (run.path / "run.json").write_text('{"name": ')
    with pytest.raises(TunelabError, match=r"a/run.json: damaged"):
        run.record()


def test_lineage_follows_models_back_to_the_first_run(tmp_path: Path) -> None:
    first = RunFolder.create(recipe(tmp_path, "first"))
    second = RunFolder.create(recipe(tmp_path, "second", str(first.path)))
    third = RunFolder.create(recipe(tmp_path, "third", str(second.path)))
    assert [run.name for run in lineage(third)] == ["first", "second", "third"]
    assert lineage(first) == [first]


def test_an_unknown_run_is_answered_with_the_nearest(tmp_path: Path) -> None:
    RunFolder.create(recipe(tmp_path, "quick-sft"))
    with pytest.raises(ConfigError, match=r"quik-sft: no such run \(did you mean 'quick-sft'\?\)"):
        RunFolder.open("quik-sft", tmp_path)
