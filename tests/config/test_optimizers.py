"""`optimizer`: defaults that depend on method and adapter, knobs that are read or refused."""

from __future__ import annotations

from typing import Any

import pytest

from tunelab.config import Recipe
from tunelab.config.optimizers import DPO_LEARNING_RATE, OPTIMIZER_KINDS, SFT_LEARNING_RATE

NAMES = [kind.model_fields["name"].default for kind in OPTIMIZER_KINDS]
LORA = {"name": "lora"}


def optimizer(method: str = "sft", adapter: dict[str, Any] | None = None, **section: Any) -> Any:
    data = {"model": {"name": "m"}, "data": {"train": "t"}, "method": {"name": method}, "adapter": adapter}
    training = {"max_grad_norm": None} if section.get("name") in ("lomo", "adalomo") else {}
    return Recipe.model_validate({**data, "optimizer": section, "training": training}).optimizer


def test_names_are_unlike() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 22


@pytest.mark.parametrize("kind", OPTIMIZER_KINDS, ids=NAMES)
def test_default_rates(kind: Any) -> None:
    """A multiple of adamw's by method and adapter (LoRA: ten times), or one for all; the class alone has SFT's."""
    name, ratio = kind.model_fields["name"].default, kind.learning_rate_ratio
    if ratio is None:
        assert optimizer(name=name).learning_rate == optimizer("dpo", LORA, name=name).learning_rate
        return
    assert kind().learning_rate == pytest.approx(ratio * SFT_LEARNING_RATE)
    assert optimizer(name=name).learning_rate == pytest.approx(ratio * SFT_LEARNING_RATE)
    assert optimizer("dpo", name=name).learning_rate == pytest.approx(ratio * DPO_LEARNING_RATE)
    assert optimizer("dpo", LORA, name=name).learning_rate == pytest.approx(10 * ratio * DPO_LEARNING_RATE)
    assert optimizer("dpo", LORA, name=name, learning_rate=0.5).learning_rate == 0.5


def test_relative_steps_of_adafactor_have_a_rate_of_their_own() -> None:
    for method, adapter in (("sft", None), ("dpo", None), ("dpo", LORA)):
        assert optimizer(method, adapter, name="adafactor", scale_parameter=True).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("name", "knob", "value"),
    [
        ("adamw", "momentum", 0.9),
        ("lion", "eps", 1e-8),
        ("sgd", "betas", [0.9, 0.999]),
        ("apollo", "update_gap", 3),
        ("adafactor", "betas", [0.9, 0.999]),
    ],
)
def test_a_knob_that_is_not_read_is_refused(name: str, knob: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{knob}\s+Extra inputs"):
        optimizer(name=name, **{knob: value})


@pytest.mark.parametrize("kind", ["linear", "cosine", "inverse_sqrt", "warmup_stable_decay"])
def test_schedule_free_refuses_schedules(kind: str) -> None:
    with pytest.raises(
        ValueError, match=f"schedule '{kind}' does not combine with it: use lr_scheduler_type: constant"
    ):
        optimizer(name="schedule_free_adamw", schedule={"lr_scheduler_type": kind})
    section = {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}
    assert optimizer(name="schedule_free_adamw", schedule=section).schedule.warmup_ratio == 0.1
