"""`evaluate`: base, SFT and DPO on the same held-out pairs, every number against plain transformers.

Two real runs of `tiny-gpt2` on a few records of `builtin:helpful-mini`, made once; seconds in all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.evaluation.test_heldout import plain_scores
from tunelab.config import Recipe, parse_recipe
from tunelab.data import Dataset, load_records, prepare
from tunelab.errors import ConfigError
from tunelab.evaluation.evaluate import arms_of, evaluate_run
from tunelab.models.tiny import build_tiny_model, build_tiny_tokenizer, tiny_config
from tunelab.progress import SilentProgress
from tunelab.runs import RunFolder
from tunelab.train import train

DATA = "builtin:helpful-mini"
HELDOUT = 6
MAX_LENGTH = 160


def recipe(method: str, model: str, root: Path, name: str, *overrides: str) -> Recipe:
    return parse_recipe(
        {
            "model": {"name": model, "device": "cpu"},
            "data": {"train": DATA, "eval": DATA, "limit_train": 12, "limit_eval": HELDOUT, "max_length": MAX_LENGTH},
            "method": {"name": method},
            "optimizer": {"learning_rate": 3e-3},
            "training": {
                "per_device_train_batch_size": 4,
                "num_threads": 1,
                "output_dir": str(root),
                "run_name": name,
            },
            "evaluation": {"generation_prompts": 0, "max_new_tokens": 6},
        },
        overrides,
    )


@dataclass(frozen=True)
class Lineage:
    sft: RunFolder
    dpo: RunFolder
    result: dict[str, Any]


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lineage]:
    root = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAB_CACHE", str(root / "cache"))
        sft = train(recipe("sft", "tiny-gpt2", root, "sft"), progress=SilentProgress())
        dpo = train(recipe("dpo", str(sft.path), root, "dpo"), progress=SilentProgress())
        yield Lineage(sft, dpo, evaluate_run(dpo, progress=SilentProgress(), generations=2))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def heldout(count: int = HELDOUT, source: str = DATA) -> Dataset:
    records = load_records(source, split="test", limit=count)
    return prepare(records, build_tiny_tokenizer(), method="dpo", max_length=MAX_LENGTH)


def plain_models(lineage: Lineage) -> dict[str, PreTrainedModel]:
    """The arms as stock transformers opens them: a run is judged by its best checkpoint."""
    opened = {
        name: AutoModelForCausalLM.from_pretrained(run.path / "best", attn_implementation="eager").eval()
        for name, run in (("sft", lineage.sft), ("dpo", lineage.dpo))
    }
    return {"base": build_tiny_model(tiny_config()), **opened}


def metrics_of(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    return {arm["name"]: arm["metrics"] for arm in result["arms"]}


def test_the_lineage_is_base_sft_dpo(lineage: Lineage) -> None:
    arms = lineage.result["arms"]
    assert [arm["name"] for arm in arms] == ["base", "sft", "dpo"]
    assert [arm["model"] for arm in arms] == ["tiny-gpt2", str(lineage.sft.path), str(lineage.dpo.path)]


def test_every_number_is_the_plain_models(lineage: Lineage) -> None:
    """nll = Σ −log p(chosen) / Σ tokens; reward = log π − log π_base, summed; likelihood: per token."""
    dataset, found = heldout(), metrics_of(lineage.result)
    models = plain_models(lineage)
    base, _ = plain_scores(models["base"], dataset.examples)
    for name, model in models.items():
        sums, counts = plain_scores(model, dataset.examples)
        nll = -sums[:, 0].sum() / counts[:, 0].sum()
        rewards = sums - base
        margins = rewards[:, 0] - rewards[:, 1]
        likelihood = (sums / counts)[:, 0] - (sums / counts)[:, 1]
        expected = {
            "eval/nll": nll,
            "eval/perplexity": np.exp(nll),
            "rewards/margins": margins.mean(),
            "preference/accuracy": (likelihood > 0).mean(),
            "preference/margin": likelihood.mean(),
        }
        for metric, value in expected.items():
            assert found[name][metric]["value"] == pytest.approx(value, rel=1e-5, abs=1e-3), (name, metric)
        if name != "base":
            assert np.abs(margins).min() > 1e-3, "the control: no margin is so small that rounding decides its sign"
            assert found[name]["rewards/accuracies"]["value"] == pytest.approx((margins > 0).mean())
    assert found["sft"]["eval/nll"]["value"] < found["base"]["eval/nll"]["value"] - 0.1, "three steps must have learned"
    assert found["dpo"]["rewards/margins"]["value"] != pytest.approx(found["sft"]["rewards/margins"]["value"], rel=0.01)


def test_the_base_arm_knows_nothing_of_its_own_preference(lineage: Lineage) -> None:
    base = metrics_of(lineage.result)["base"]
    assert base["rewards/accuracies"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": HELDOUT}
    assert base["rewards/margins"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": HELDOUT}


def test_every_interval_holds_its_value(lineage: Lineage) -> None:
    assert lineage.result["num_records"] == HELDOUT
    for arm in lineage.result["arms"]:
        for name, metric in arm["metrics"].items():
            assert metric["low"] <= metric["value"] <= metric["high"], (arm["name"], name)
            assert metric["n"] == HELDOUT


def test_differences_are_second_minus_first(lineage: Lineage) -> None:
    found, seen = metrics_of(lineage.result), []
    for row in lineage.result["differences"]:
        seen.append((row["from"], row["to"], row["metric"]))
        expected = found[row["to"]][row["metric"]]["value"] - found[row["from"]][row["metric"]]["value"]
        assert row["value"] == pytest.approx(expected, abs=1e-9), seen[-1]
        assert row["low"] <= row["value"] <= row["high"]
    # A stage's own accuracy has another reference in every arm: a difference of two would mean nothing.
    per_record = [name for name in found["base"] if name not in ("eval/perplexity", "stage/accuracies")]
    pairs = (("base", "sft"), ("sft", "dpo"), ("base", "dpo"))
    assert seen == [(*pair, name) for pair in pairs for name in per_record]
    learned = next(row for row in lineage.result["differences"] if row["metric"] == "eval/nll")
    assert learned["value"] < 0, "sft − base: the loss fell"


def test_a_stage_is_measured_against_the_one_before(lineage: Lineage) -> None:
    found = metrics_of(lineage.result)
    assert found["base"]["stage/accuracies"]["value"] == 0.5
    assert found["sft"]["stage/accuracies"] == found["sft"]["rewards/accuracies"], "sft starts from the base"
    both = {row["metric"]: row for row in lineage.result["differences"] if (row["from"], row["to"]) == ("sft", "dpo")}
    # The margin over sft is the margin over base less sft's own: its sign must be that of most pairs here.
    assert (found["dpo"]["stage/accuracies"]["value"] > 0.5) == (both["rewards/margins"]["value"] > 0)


def test_answers_of_all_arms_stand_beside_the_datas_own(lineage: Lineage) -> None:
    generations = lineage.result["generations"]
    assert len(generations) == 2
    for shown in generations:
        assert set(shown["answers"]) == {"base", "sft", "dpo"}
        assert shown["prompt"].endswith("Assistant:")
        assert shown["reference"]


def test_evaluation_json_is_the_result_and_strict_json(lineage: Lineage) -> None:
    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is no JSON")

    written = json.loads((lineage.dpo.path / "evaluation.json").read_text(), parse_constant=refuse)
    assert written == lineage.result
    assert written["schema_version"] == 1
    assert written["data"] == DATA
    assert not list(lineage.dpo.path.glob(".evaluation.json*")), "no temporary file is left"


def test_limit_takes_a_fixed_sample(lineage: Lineage, tmp_path: Path) -> None:
    def evaluate(limit: int) -> dict[str, Any]:
        return evaluate_run(lineage.sft, progress=SilentProgress(), limit=limit, generations=0)

    first, again = evaluate(3), evaluate(3)
    assert first == again
    assert first["num_records"] == 3
    assert first["generations"] == []
    dataset = heldout()
    sums, counts = plain_scores(build_tiny_model(tiny_config()), dataset.examples)
    value = metrics_of(first)["base"]["eval/nll"]["value"]
    subsets = [[i, j, k] for i in range(6) for j in range(i) for k in range(j)]
    assert any(value == pytest.approx(-sums[s, 0].sum() / counts[s, 0].sum(), rel=1e-6) for s in subsets)
    assert evaluate(100)["num_records"] == HELDOUT


def test_an_sft_run_is_evaluated_on_the_pairs_too(lineage: Lineage) -> None:
    """Its eval data are preference pairs: the chosen answers give its loss, and rewards are measured as for DPO."""
    result = evaluate_run(lineage.sft, progress=SilentProgress(), generations=0)
    assert [arm["name"] for arm in result["arms"]] == ["base", "sft"]
    for name, metrics in metrics_of(result).items():
        for metric, value in metrics_of(lineage.result)[name].items():
            assert metrics[metric] == pytest.approx(value, rel=1e-6), (name, metric)
    assert {(row["from"], row["to"]) for row in result["differences"]} == {("base", "sft")}


def test_other_data_of_another_shape(lineage: Lineage, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    rows = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}, of course."} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate_run(lineage.sft, progress=SilentProgress(), data=str(path), generations=1)
    assert result["data"] == str(path)
    assert result["num_records"] == 4
    assert set(metrics_of(result)["base"]) == {"eval/nll", "eval/perplexity"}, "no preferences without pairs"
    dataset = prepare(load_records(str(path)), build_tiny_tokenizer(), method="sft", max_length=MAX_LENGTH)
    for name in ("base", "sft"):
        sums, counts = plain_scores(plain_models(lineage)[name], dataset.examples)
        assert metrics_of(result)[name]["eval/nll"]["value"] == pytest.approx(-sums.sum() / counts.sum(), rel=1e-5)


def test_other_data_is_not_cut_by_the_recipes_limit(lineage: Lineage, tmp_path: Path) -> None:
    """`limit_eval` is about the recipe's own eval data; whoever names a file wants all of it."""
    path = tmp_path / "ten.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} is", "completion": " odd."}) + "\n" for n in range(10)))
    result = evaluate_run(lineage.sft, progress=SilentProgress(), data=str(path), generations=0)
    assert result["num_records"] == 10


def test_without_eval_data_it_is_said_how_to_give_some(tmp_path: Path) -> None:
    run = RunFolder.create(recipe("sft", "tiny-gpt2", tmp_path, "blind", "data.eval=null"))
    with pytest.raises(ConfigError, match=r"names no eval data; give some with --data FILE"):
        evaluate_run(run, progress=SilentProgress())
    assert not (run.path / "evaluation.json").exists()


def test_stages_of_the_same_method_are_numbered(tmp_path: Path) -> None:
    model, names = "tiny-gpt2", []
    for number, method in enumerate(("sft", "sft", "dpo", "sft")):
        run = RunFolder.create(recipe(method, model, tmp_path, f"stage{number}"))
        model = str(run.path)
        names = [arm.name for arm in arms_of(run)]
    assert names == ["base", "sft", "sft-2", "dpo", "sft-3"]
