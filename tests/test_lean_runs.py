"""Whole runs whose updates reach the weights in another way: released, rounded, taking turns. `tiny-gpt2`."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.test_train import Make, curve, final_weights, recipe_data
from tunelab.config import parse_recipe
from tunelab.errors import ConfigError, DivergedError
from tunelab.manifest import checkpoint_name, list_checkpoints
from tunelab.progress import SilentProgress
from tunelab.runs import RunFolder
from tunelab.train import train

RELEASE = {"training__gradient_release": True, "training__max_grad_norm": None}
STORED = {"model__precision": "bf16-stored"}
ADAMW = {"name": "adamw", "learning_rate": 2e-3}

LEAN: dict[str, dict[str, Any]] = {
    "release": RELEASE,
    "stored": STORED,
    "pure": {"model__precision": "bf16-pure"},
    "release and stored": RELEASE | STORED,
    "lisa": {"optimizer": {**ADAMW, "name": "lisa", "lisa_activated_layers": 1, "lisa_interval_steps": 2}},
    "badam": {"optimizer": {**ADAMW, "name": "badam", "switch_every": 2, "include_embedding": True}},
    "badam at once": {"optimizer": {**ADAMW, "name": "badam", "switch_every": 1}} | RELEASE | STORED,
    "lomo": {"optimizer": {"name": "lomo", "learning_rate": 0.1}},
    "adalomo": {"optimizer": {"name": "adalomo", "learning_rate": 1e-2}} | STORED,
}


@pytest.fixture
def run(tmp_path: Path) -> Make:
    """Six steps of four records, saved after each."""
    numbers = itertools.count()

    def make(progress: SilentProgress | None = None, **settings: Any) -> RunFolder:
        settings = {
            "data__limit_train": 24,
            "evaluation__eval_steps": 6,
            "training__save_steps": 1,
            "training__save_total_limit": 10,
            "training__run_name": f"run{next(numbers)}",
        } | settings
        return train(parse_recipe(recipe_data(tmp_path, **settings)), progress=progress or SilentProgress())

    return make


@pytest.mark.parametrize("name", LEAN)
def test_resumed_from_the_middle_it_has_the_same_bits(run: Make, name: str) -> None:
    made = run(**LEAN[name])
    expected, losses = final_weights(made), curve(made)
    assert losses[-1] < losses[0]
    for path in list_checkpoints(made.checkpoints):
        if path.name > checkpoint_name(3):
            shutil.rmtree(path)
    (made.path / "best").unlink(missing_ok=True)
    again = train(made.recipe(), progress=SilentProgress(), resume=made)
    assert again.record()["resumes"][-1]["step"] == 3
    assert final_weights(again) == expected
    assert curve(again) == losses


def test_release_changes_no_bit_of_a_run(run: Make) -> None:
    plain, released = run(training__max_grad_norm=None), run(**RELEASE)
    assert final_weights(plain) == final_weights(released)
    assert curve(plain, "grad_norm") == pytest.approx(curve(released, "grad_norm"), rel=1e-6)
    assert curve(plain, "learning_rate") == curve(released, "learning_rate")


def test_stored_weights_are_bf16_and_their_state_float32(run: Make) -> None:
    last = list_checkpoints(run(**RELEASE, **STORED).checkpoints)[-1]
    assert {tensor.dtype for tensor in load_file(last / "model.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(last / "optimizer.safetensors").values()} == {torch.float32}


def test_layers_that_do_not_train_have_no_state_in_a_checkpoint(run: Make) -> None:
    made = run(optimizer={**ADAMW, "name": "badam", "switch_every": 2})
    last = list_checkpoints(made.checkpoints)[-1]
    numbers = {name.split(".")[0] for name in load_file(last / "optimizer.safetensors")}
    assert len(numbers) == 12, "tensors of one GPT-2 layer"
    groups = json.loads((last / "optimizer.json").read_text())["groups"]
    assert sum(len(group["params"]) for group in groups) == 24, "and both layers are the optimizer's"


def test_release_takes_a_step_in_one_micro_batch(run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's default budget is one of speed; here it would split every step."""
    monkeypatch.setattr("tunelab.session.MICRO_BATCH_TOKENS", {"cpu": 1})
    assert run(**RELEASE).record()["status"] == "completed"


def test_release_within_a_budget_that_would_split_a_step_is_refused(run: Make, tmp_path: Path) -> None:
    message = (
        r"training\.max_tokens_per_micro_batch: step \d has 4 records with (\d+) tokens, and gradient_release takes a "
        r"step in one micro-batch; set it to \1 or more"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        run(**RELEASE, training__max_tokens_per_micro_batch=100)
    enough = int(str(caught.value).split("with ")[1].split(" tokens")[0])
    assert run(**RELEASE, training__max_tokens_per_micro_batch=enough).record()["status"] == "completed"


def test_a_run_that_diverges_under_release_saves_nothing_of_the_broken_step(run: Make, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"is not finite"):
        run(**RELEASE, optimizer={"name": "sgd", "learning_rate": 1e30}, training__run_name="broken")
    folder = RunFolder(tmp_path / "runs" / "broken")
    assert folder.record()["status"] == "diverged"
    for path in list_checkpoints(folder.checkpoints):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values()), path.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {**STORED, "model__kernels": "plain"},
            r"bf16-stored multiplies in float32, .* kernels: plain leaves them out",
        ),
        (
            {**STORED, "model__layout": "padded"},
            r"bf16-stored multiplies in float32, .* layout: padded leaves them out",
        ),
        ({**STORED, "model__dropout": 0.1}, "which only the fused blocks can .* it has dropout"),
        ({"training__stochastic_rounding": True}, "stochastic_rounding is read where weights are bf16"),
        ({"optimizer": {"name": "lisa", "lisa_activated_layers": 5}}, "5 is more than the 2 layers"),
        (
            {"optimizer": {"name": "lisa"}, "adapter": {"name": "prompt_tuning", "num_virtual_tokens": 4}},
            "lisa trains layers in turn, and none of them is trainable here",
        ),
    ],
)
def test_what_cannot_be_is_refused(run: Make, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Before a run folder is made, where weights are not needed to know."""
    with pytest.raises(ConfigError, match=message):
        run(**settings)
    assert (tmp_path / "runs").exists() == ("it has dropout" in message)
