"""Lists, filters and comparisons of runs on disk."""

from __future__ import annotations

import json

import pytest

from tests.report.synthetic import build_run, write_evaluation
from tunelab.config import parse_recipe
from tunelab.errors import ConfigError
from tunelab.report.compare import Filter, compare, final_metrics, flatten, list_table, recipe_keys
from tunelab.runs import RunFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[RunFolder]:
    root = tmp_path_factory.mktemp("runs")
    sft = build_run(root, "sft-a", steps=24)
    dpo = build_run(root, "dpo-a", "dpo", steps=12)
    write_evaluation(dpo)
    bare = RunFolder.create(
        parse_recipe(
            {
                "model": {"name": "tiny-gpt2"},
                "data": {"train": "train.jsonl"},
                "method": {"name": "sft"},
                "optimizer": {"name": "sgd", "momentum": 0.9},
                "training": {"output_dir": str(root), "run_name": "bare", "max_steps": 7},
            }
        )
    )
    return [sft, dpo, bare]


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ([], ["sft-a", "dpo-a", "bare"]),
        (["status=completed"], ["sft-a", "dpo-a"]),
        (["status!=completed"], ["bare"]),
        (["method=dpo"], ["dpo-a"]),
        (["method = dpo"], ["dpo-a"]),
        (["method.name==dpo"], ["dpo-a"]),
        (["model=tiny-gpt2"], ["bare"]),  # before the model is loaded, the recipe's own word
        (["eval/loss<2.5"], ["sft-a", "dpo-a"]),
        (["eval/loss<1"], ["dpo-a"]),
        (["eval/loss>=1", "status=completed"], ["sft-a"]),
        (["cost.tokens>30000"], ["sft-a"]),
        (["cost.seconds.training<=95.2"], ["sft-a", "dpo-a"]),
        (["optimizer.learning_rate=2e-5"], ["sft-a"]),  # numbers as numbers
        (["optimizer.learning_rate<1e-5"], ["dpo-a"]),
        (["optimizer.momentum=0.9"], ["bare"]),  # a key that only some recipes have
        (["optimizer.momentum!=0.9"], ["sft-a", "dpo-a"]),
        (["method.beta>0"], ["dpo-a"]),
        (["data.shuffle=true"], ["sft-a", "dpo-a", "bare"]),
        (["data.shuffle=false"], []),
        (["training.max_steps=null"], ["sft-a", "dpo-a"]),
        (["data.eval=builtin:helpful-mini"], ["sft-a", "dpo-a"]),
        (["eval/rewards/accuracies>0.5"], ["dpo-a"]),
    ],
)
def test_filters(runs, filters, names):
    assert [row["name"] for row in list_table(runs, filters)] == names


def test_a_row(runs):
    row = list_table(runs)[0]
    assert row["path"] == str(runs[0].path)
    assert (row["method"], row["model"], row["steps"], row["tokens"]) == ("sft", "smollm2-135m", 24, 43_200)
    assert row["seconds"] == 121.9
    assert row["metrics"]["eval/loss"] == runs[0].record()["best"]["eval/loss"]
    empty = list_table(runs)[2]
    assert (empty["status"], empty["steps"], empty["metrics"]) == ("created", None, {})
    json.dumps(list_table(runs), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metod=dpo", "filter 'metod': no such key (did you mean 'method'?)"),
        ("eval/los<2", "filter 'eval/los': no such key (did you mean 'eval/loss'?)"),
        ("optimizer.learning_rat=1", "did you mean 'optimizer.learning_rate'?"),
        ("zzz=1", "no such key; filter by name, method, status"),
        ("method", "filter 'method': expected key=value"),
        ("=dpo", "expected key=value"),
        ("method=", "expected key=value"),
        ("eval/loss<low", "'<' compares numbers, and 'low' is none"),
    ],
)
def test_a_wrong_filter_says_how_to_mend_it(runs, text, message):
    with pytest.raises(ConfigError) as error:
        list_table(runs, [text])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_known_metrics_may_be_asked_of_no_runs():
    assert list_table([], ["eval/loss<2.5", "method=dpo"]) == []


def test_nan_passes_no_order():
    assert not Filter.parse("x<1").accepts(float("nan"))
    assert not Filter.parse("x>1").accepts("text")


def test_compare(runs):
    found = compare(runs[:2])
    assert found["runs"] == ["sft-a", "dpo-a"]
    assert found["status"] == ["completed", "completed"]
    assert found["config_diff"]["method.name"] == ["sft", "dpo"]
    assert found["config_diff"]["method.beta"] == [None, 0.1]
    assert found["config_diff"]["optimizer.learning_rate"] == [2e-5, 5e-6]
    same = {"training.run_name", "training.output_dir", "model.name", "optimizer.name", "training.seed"}
    assert not same & set(found["config_diff"])
    assert found["metrics"]["eval/loss"] == [run.record()["best"]["eval/loss"] for run in runs[:2]]
    assert found["metrics"]["rewards/margins"][0] is None
    assert found["evaluation"]["preference/accuracy"][0] is None
    assert found["evaluation"]["preference/accuracy"][1]["value"] == 0.615  # the dpo arm, not the base's
    assert found["cost"]["seconds.total"] == [121.9, 121.9]
    json.dumps(found, allow_nan=False)


def test_a_run_compared_with_itself_differs_in_nothing(runs):
    assert compare([runs[0], runs[0]])["config_diff"] == {}


def test_final_metrics_are_the_kept_models(tmp_path):
    """Best at step 2 of 4: its evaluation counts, not the last; the train row is the last one; NaN is left out."""
    run = build_run(tmp_path, "r", steps=4)
    (run.path / "metrics.jsonl").unlink()
    for step, loss in ((2, 1.5), (4, 1.9)):
        run.log_metrics(step, "train", {"train/loss": loss, "grad_norm": float("nan")})
        run.log_metrics(step, "eval", {"eval/loss": loss + 0.1})
    run.update(best={"step": 2, "eval/loss": 1.6})
    assert final_metrics(run) == {"train/loss": 1.9, "eval/loss": 1.6}
    run.update(best=None)
    assert final_metrics(run) == {"train/loss": 1.9, "eval/loss": 2.0}


def test_recipe_keys_cover_every_member_of_a_union(runs):
    keys = recipe_keys()
    assert {"method.loss_on", "method.beta", "optimizer.nesterov", "optimizer.schedule.decay_ratio"} <= keys
    for run in runs:
        assert set(flatten(run.recipe().resolved())) <= keys
