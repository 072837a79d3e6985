"""Commands on real tiny runs: what is on stdout, what on stderr, and the exit code."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import RECIPES, SMALL

SFT, DPO = RECIPES / "tiny-sft.yaml", RECIPES / "tiny-dpo.yaml"


class TestTraining:
    def test_a_run(self, tunelab, tmp_path: Path) -> None:
        ended = tunelab("sft", SFT, *SMALL, f"training.output_dir={tmp_path}", "training.run_name=x")
        assert ended.code == 0
        names = [line.split()[0] for line in ended.out.splitlines()]
        assert names == ["run", "result", "best", "cost", "speed", "report", "next"]
        assert (tmp_path / "x" / "report.html").read_text().startswith("<!doctype html>")
        assert "training 2/2" in ended.err
        assert "8 of 8 records" in ended.err
        again = tunelab("sft", SFT, f"training.output_dir={tmp_path}", "training.run_name=x", "-q")
        assert again.code == 2
        assert f"{tmp_path}/x exists; choose another name, or continue it with --resume {tmp_path}/x" in again.err

    def test_dry_run_trains_nothing(self, tunelab, tmp_path: Path) -> None:
        ended = tunelab("dpo", DPO, *SMALL, f"training.output_dir={tmp_path}", "--dry-run", "--json", "--quiet")
        assert ended.json["counts"]["steps"] == 2
        assert ended.json["counts"]["records"] == 16
        assert ended.err == ""
        assert list(tmp_path.iterdir()) == []
        plain = tunelab("dpo", DPO, *SMALL, "--dry-run")
        assert "Nothing was trained (--dry-run)." in plain.out
        assert re.search(r"^sees +16 records, [\d,]+ tokens \([\d,]+ with loss\)$", plain.out, re.MULTILINE)

    def test_wrong_override_is_refused_before_anything_is_made(self, tunelab, tmp_path: Path) -> None:
        ended = tunelab("sft", SFT, f"training.output_dir={tmp_path}", "optimizer.learning_rat=1")
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("error: override: optimizer.learning_rat: unknown key (did you mean")
        assert list(tmp_path.iterdir()) == []

    def test_data_errors_exit_with_3(self, tunelab, tmp_path: Path) -> None:
        (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
        ended = tunelab("sft", SFT, f"data.train={tmp_path}/bad.jsonl", f"training.output_dir={tmp_path}/runs", "-q")
        assert ended.code == 3
        assert ended.err.startswith(f"error: {tmp_path}/bad.jsonl:2: ")
        assert ended.err.count("\n") == 1

    def test_the_other_method(self, tunelab) -> None:
        ended = tunelab("dpo", SFT)
        assert ended.code == 2
        assert "method.name is 'sft' but the command is 'dpo'; run `tunelab sft`" in ended.err

    def test_resume_takes_its_recipe_from_the_run(self, tunelab, runs_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(runs_dir / "sft", tmp_path / "sft", symlinks=True)
        ended = tunelab("sft", "--resume", "sft", "--runs-dir", tmp_path, "--json", "-q")
        assert ended.code == 0
        assert ended.json["record"]["status"] == "completed"
        assert Path(ended.json["run"]) == tmp_path / "sft"
        given = tunelab("sft", SFT, "--resume", tmp_path / "sft")
        assert f"its recipe is read from the run; remove '{SFT}'" in given.err
        drifted = tunelab("sft", "--resume", tmp_path / "sft", "training.seed=7", "-q")
        assert drifted.code == 2
        assert "--allow-drift" in drifted.err

    def test_an_interruption_says_how_to_continue(self, tunelab, monkeypatch: pytest.MonkeyPatch) -> None:
        from tunelab import train
        from tunelab.errors import Interrupted

        def interrupted(*_: Any, **__: Any) -> None:
            raise Interrupted("stopped (saved); continue with: tunelab sft --resume runs/x", 75)

        monkeypatch.setattr(train, "train", interrupted)
        ended = tunelab("sft", SFT)
        assert (ended.code, ended.out) == (75, "")
        assert ended.err == "stopped (saved); continue with: tunelab sft --resume runs/x\n"


def test_quickstart_prints_its_table(tunelab, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunelab import quickstart as room

    asked: dict[str, Any] = {}

    def quickstart(**keywords: Any) -> dict[str, Any]:
        asked.update(keywords)
        return {
            "report": "out/x/report.html",
            "table": {"columns": ["", "base", "dpo"], "rows": [["loss", "2.31 [2.2, 2.4]", "2.01 [1.9, 2.1]"]]},
            "next_commands": ["tunelab chat out/x", "tunelab sft recipes/smollm2-sft-cpu.yaml"],
            "seconds": 200.4,
            "runs": ["out/w", "out/x"],
        }

    monkeypatch.setattr(room, "quickstart", quickstart)
    ended = tunelab("quickstart", "--output-dir", "out")
    assert ended.out == (
        "                 base              dpo\n"
        "loss  2.31 [2.2, 2.4]  2.01 [1.9, 2.1]\n"
        "\n"
        "report  out/x/report.html\n"
        "took    3m20s\n"
        "\n"
        "Try next:\n"
        "  tunelab chat out/x\n"
        "  tunelab sft recipes/smollm2-sft-cpu.yaml\n"
    )
    assert (asked["output_dir"], asked["model"]) == ("out", "smollm2-135m")
    assert tunelab("quickstart", "--json").json["runs"] == ["out/w", "out/x"]


class TestInspect:
    def test_brackets_where_there_is_no_colour(self, tunelab) -> None:
        ended = tunelab("inspect", DPO, *SMALL, "--samples", "1")
        assert ended.code == 0
        assert "\x1b" not in ended.out
        assert ended.out.count("⟦") == 3  # chosen, rejected, and the legend
        assert "<|endoftext|>⟧" in ended.out
        assert ended.out.endswith("⟦…⟧: text that carries loss.\n")

    def test_colour_where_it_is_wanted(self, tunelab, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        ended = tunelab("inspect", DPO, *SMALL, "--samples", "1")
        assert "\x1b[" in ended.out
        assert "⟦" not in ended.out

    def test_json(self, tunelab) -> None:
        found = tunelab("inspect", SFT, *SMALL, "--json", "--samples", "2", "--eval").json
        assert len(found["samples"]) == 2
        assert found["summary"]["split"] == "test"
        assert found["summary"]["used"] == 4

    def test_no_eval_data(self, tunelab) -> None:
        ended = tunelab("inspect", SFT, "data.eval=null", "--eval")
        assert ended.code == 2
        assert "names no eval data; set data.eval" in ended.err


class TestEvaluate:
    def test_every_stage_has_a_column(self, tunelab, runs_dir: Path) -> None:
        ended = tunelab("evaluate", "dpo", "--runs-dir", runs_dir, "--limit", "3", "--generations", "1")
        assert ended.code == 0
        lines = ended.out.splitlines()
        assert lines[0] == "3 records of builtin:helpful-mini, 95% intervals"
        assert lines[2].split() == ["base", "sft", "dpo"]
        metrics = json.loads((runs_dir / "dpo" / "evaluation.json").read_text())["arms"][0]["metrics"]
        assert len(metrics) >= 4
        assert [line.split()[0] for line in lines[3 : 3 + len(metrics)]] == list(metrics)
        assert [line for line in lines if line.startswith("[")] == ["[base]", "[sft]", "[dpo]", "[data]"]
        assert "evaluating dpo 3/3" in ended.err

    def test_json(self, tunelab, runs_dir: Path) -> None:
        ended = tunelab("evaluate", runs_dir / "sft", "--limit", "2", "--generations", "0", "--json", "-q")
        assert [arm["name"] for arm in ended.json["arms"]] == ["base", "sft"]
        assert ended.err == ""


class TestRuns:
    def test_list(self, tunelab, runs_dir: Path) -> None:
        ended = tunelab("runs", "--runs-dir", runs_dir)
        header, *rows = ended.out.splitlines()
        assert header.split()[:5] == ["name", "method", "model", "trained", "status"]
        assert [row.split()[3] for row in rows] == ["all", "all"]
        assert [row.split()[0] for row in rows] == ["sft", "dpo"]
        assert tunelab("runs", "list", "--runs-dir", runs_dir).out == ended.out

    def test_filters(self, tunelab, runs_dir: Path) -> None:
        found = tunelab("runs", "method=dpo", "status=completed", "--runs-dir", runs_dir, "--json").json["runs"]
        assert [run["name"] for run in found] == ["dpo"]
        last = tunelab("runs", "--last", "1", "--runs-dir", runs_dir, "--json").json["runs"]
        assert [run["name"] for run in last] == ["dpo"]
        none = tunelab("runs", "method=ppo", "--runs-dir", runs_dir)
        assert (none.code, none.out.splitlines()[0][:36]) == (0, "no run meets these conditions; `tune")
        wrong = tunelab("runs", "metod=dpo", "--runs-dir", runs_dir)
        assert (wrong.code, wrong.out) == (2, "")
        assert "did you mean 'method'?" in wrong.err

    def test_no_runs_at_all(self, tunelab, tmp_path: Path) -> None:
        assert tunelab("runs", "--runs-dir", tmp_path, "--json").json["runs"] == []
        assert tunelab("runs", "--runs-dir", tmp_path / "nowhere").out.startswith("no runs under")

    def test_show(self, tunelab, runs_dir: Path) -> None:
        ended = tunelab("runs", "show", "dpo", "--runs-dir", runs_dir)
        assert "status   completed\n" in ended.out
        assert "\nmodel:\n" in ended.out  # the resolved recipe
        assert "continue" not in ended.out
        header = next(line for line in ended.out.splitlines() if line.strip().startswith("forecast"))
        assert header.split() == ["forecast", "measured", "forecast", "off", "by"]
        assert re.search(r"^Tokens trained on +([\d,]+) +\1 +0\.0%$", ended.out, re.MULTILINE)
        assert re.search(r"^model +\S+, [\d,]+ parameters$", ended.out, re.MULTILINE)
        found = tunelab("runs", "show", runs_dir / "dpo", "--json").json
        assert found["recipe"]["method"]["beta"] == 0.1
        assert found["record"]["status"] == "completed"

    def test_show_a_run_that_did_not_finish(self, tunelab, tmp_path: Path) -> None:
        from tunelab.config import load_recipe
        from tunelab.runs import RunFolder

        run = RunFolder.create(load_recipe(SFT, [f"training.output_dir={tmp_path}", "training.run_name=x"]))
        run.update(status="failed", error="out of memory")
        shown = tunelab("runs", "show", "x", "--runs-dir", tmp_path).out
        assert "status    failed: out of memory\n" in shown
        assert f"continue  tunelab sft --resume {tmp_path}/x\n" in shown

    def test_compare(self, tunelab, runs_dir: Path) -> None:
        ended = tunelab("runs", "compare", "sft", "dpo", "--runs-dir", runs_dir)
        cells = {line.split("  ")[0]: line.split()[1:] for line in ended.out.splitlines() if line}
        assert cells["method.name"] == ["sft", "dpo"]
        assert cells["status"] == ["completed", "completed"]
        assert cells["method.beta"] == ["null", "0.1"]
        assert cells["steps"] == ["2", "2"]
        assert cells["parameters"] == cells["trainable_parameters"] == ["198,400", "198,400"]
        assert "model.precision" not in cells  # equal in both
        assert tunelab("runs", "compare", "sft", "dpo", "--runs-dir", runs_dir, "--json").json["runs"] == ["sft", "dpo"]

    def test_a_near_name(self, tunelab, runs_dir: Path) -> None:
        ended = tunelab("runs", "compare", "sft", "dpoo", "--runs-dir", runs_dir)
        assert (ended.code, ended.err) == (2, "error: dpoo: no such run (did you mean 'dpo'?)\n")


class TestExport:
    def test_stock_transformers_opens_it_and_agrees(self, tunelab, runs_dir: Path, tmp_path: Path) -> None:
        """The exported folder's logits are those of the run's checkpoint, and no training state is in it."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        ended = tunelab("export", "dpo", tmp_path / "model", "--runs-dir", runs_dir)
        assert ended.code == 0
        names = {path.name for path in (tmp_path / "model").iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
        assert not {"optimizer.safetensors", "state.json", "rng.safetensors", "manifest.json"} & names
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        kept = AutoModelForCausalLM.from_pretrained((runs_dir / "dpo" / "best").resolve())
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        ids = torch.tensor([tokenizer("What is soup?")["input_ids"]])
        assert torch.equal(exported(ids).logits, kept(ids).logits)

    def test_a_folder_with_files_is_left_alone(self, tunelab, runs_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("x")
        words = ["export", runs_dir / "sft", tmp_path]
        refused = tunelab(*words)
        assert refused.code == 2
        assert "is not empty; name a new folder, or write into it with --force" in refused.err
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
        assert tunelab(*words, "--force").code == 0
        assert (tmp_path / "mine.txt").read_text() == "x"

    def test_which_checkpoint(self, tunelab, runs_dir: Path, tmp_path: Path) -> None:
        last = tunelab("export", runs_dir / "sft", tmp_path / "a", "--checkpoint", "last", "--json").json
        assert last["checkpoint"] == "step-000002"
        step = tunelab("export", runs_dir / "sft", tmp_path / "b", "--checkpoint", "2", "--json").json
        assert step["checkpoint"] == "step-000002"
        wrong = tunelab("export", runs_dir / "sft", tmp_path / "c", "--checkpoint", "lst")
        assert wrong.code == 2
        assert "--checkpoint: 'lst' is not one of best, last, " in wrong.err
        assert "(did you mean 'last'?)" in wrong.err
        assert not (tmp_path / "c").exists()

    def test_a_damaged_checkpoint_is_not_exported(self, tunelab, runs_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(runs_dir / "sft", tmp_path / "sft", symlinks=True)
        weights = tmp_path / "sft" / "checkpoints" / "step-000002" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-100] ^= 1
        weights.write_bytes(content)
        ended = tunelab("export", tmp_path / "sft", tmp_path / "out", "--checkpoint", "2")
        assert ended.code == 1
        assert "its sha256 is not the one it was written with" in ended.err
        assert not (tmp_path / "out").exists()


class TestChat:
    def test_each_line_of_a_pipe_is_a_prompt(self, tunelab, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same question twice gets the same answer twice: no prompt knows of another."""
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nWhat is soup?\nHello\n"))
        words = ["chat", "dpo", "--runs-dir", runs_dir, "--max-new-tokens", "6"]
        answers = tunelab(*words, "--json").json["answers"]
        assert [answer["prompt"] for answer in answers] == ["Hello", "What is soup?", "Hello"]
        assert answers[0] == answers[2]
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        assert tunelab(*words).out == answers[0]["answer"] + "\n"

    def test_the_seed_decides(self, tunelab, monkeypatch: pytest.MonkeyPatch) -> None:
        def answer(*words: str) -> str:
            monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
            text: str = tunelab("chat", "tiny-gpt2", "--max-new-tokens", "8", *words).out
            return text

        assert answer("--seed", "1") == answer("--seed", "1") != answer("--seed", "2")
        assert answer("--temperature", "0") == answer("--temperature", "0", "--seed", "2")

    def test_a_name_that_is_nothing(self, tunelab) -> None:
        ended = tunelab("chat", "runs/no/such")
        assert (ended.code, ended.out) == (2, "")
        assert "model.name: runs/no/such does not exist" in ended.err


def test_json_never_shares_stdout(tunelab, runs_dir: Path) -> None:
    """What stdout holds parses as one object, with progress on, for every command that reads a run."""
    for words in (["runs"], ["runs", "show", "sft"], ["evaluate", "sft", "--limit", "2", "--generations", "0"]):
        ended = tunelab(*words, "--runs-dir", runs_dir, "--json")
        assert json.loads(ended.out)["schema_version"] == 1
