"""`tunelab quickstart` end to end, with the model that needs no download: two trainings, one comparison, one report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tunelab.progress import SilentProgress
from tunelab.quickstart import DPO_PAIRS, HELDOUT_PAIRS, SFT_RECORDS, quickstart
from tunelab.runs import RunFolder, lineage


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    root, threads = tmp_path_factory.mktemp("quickstart"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAB_CACHE", str(root / "cache"))
        yield quickstart(output_dir=str(root / "runs"), progress=SilentProgress(), model="tiny-gpt2")
    torch.set_num_threads(threads)


@pytest.fixture
def runs(result: dict[str, Any]) -> tuple[RunFolder, RunFolder]:
    sft, dpo = (RunFolder.open(path) for path in result["runs"])
    return sft, dpo


def test_the_result_is_plain_json(result: dict[str, Any]) -> None:
    assert set(result) == {"report", "table", "next_commands", "seconds", "runs"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["seconds"] > 0


def test_the_table_stands_base_sft_and_dpo_side_by_side(
    result: dict[str, Any], runs: tuple[RunFolder, RunFolder]
) -> None:
    table = result["table"]
    assert table["columns"] == ["", "base", "sft", "dpo"]
    assert [row[0] for row in table["rows"]] == [
        "held-out loss (nats/token)",
        "held-out perplexity",
        "reward margin over base (nats)",
        "reward accuracy over base",
        "reward accuracy over last stage",
    ]
    cell = re.compile(r"^-?\d+\.\d{3} \[-?\d+\.\d{3}, -?\d+\.\d{3}\]$")
    for row in table["rows"]:
        assert len(row) == 4
        assert all(cell.match(text) for text in row[1:]), row
    assert table["rows"][3][1] == "0.500 [0.500, 0.500]", "the base model has no preference over itself"
    # The cells are those of evaluation.json, arm by arm.
    evaluation = json.loads((runs[1].path / "evaluation.json").read_text())
    for column, arm in enumerate(evaluation["arms"], 1):
        value = arm["metrics"]["eval/nll"]["value"]
        assert table["rows"][0][column].startswith(f"{value:.3f} [")


def test_both_run_folders_are_complete(runs: tuple[RunFolder, RunFolder]) -> None:
    for run, method, records in zip(runs, ("sft", "dpo"), (SFT_RECORDS, DPO_PAIRS), strict=True):
        record = run.record()
        assert (record["status"], record["method"]) == ("completed", method)
        assert record["cost"]["samples"] == records
        assert record["data"]["eval"]["used"] == HELDOUT_PAIRS
        assert record["data"]["eval_records_also_trained_on"] == 0
        assert {"config.yaml", "run.json", "metrics.jsonl", "checkpoints", "best"} <= {
            path.name for path in run.path.iterdir()
        }
        assert (run.path / "best" / "model.safetensors").is_file()
        assert [row["step"] for row in run.metrics("train")] == list(range(1, records // 4 + 1))


def test_dpo_continues_from_the_sft_run(runs: tuple[RunFolder, RunFolder]) -> None:
    sft, dpo = runs
    assert sft.recipe().model.name == "tiny-gpt2"
    assert dpo.recipe().model.name == str(sft.path)
    assert [run.path for run in lineage(dpo)] == [sft.path, dpo.path]


def test_the_report_tells_of_all_three(result: dict[str, Any], runs: tuple[RunFolder, RunFolder]) -> None:
    report = Path(result["report"])
    assert report == runs[1].path / "report.html"
    page = report.read_text(encoding="utf-8")
    words = re.sub(r"<(style|svg)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    for arm in ("base", "sft", "dpo"):
        assert re.search(rf"\b{arm}\b", words), arm
    assert "Stage 1: sft" in words
    assert "Stage 2: dpo" in words
    assert not re.search(r"""(?:src|href)=["']https?://""", page), "self-contained"


def test_the_next_commands_are_two_that_exist(result: dict[str, Any], runs: tuple[RunFolder, RunFolder]) -> None:
    chat, recipe = result["next_commands"]
    assert chat == f"tunelab chat {runs[1].path}"
    assert recipe.startswith("tunelab sft ")
    assert (Path(__file__).parents[1] / recipe.split()[-1]).is_file()
