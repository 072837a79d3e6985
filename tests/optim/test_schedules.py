"""Schedules: values by hand, transformers as an oracle after the warm-up, properties over all of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers import get_scheduler

from tunelab.config import ScheduleConfig
from tunelab.errors import ConfigError
from tunelab.optim import build_schedule

ADAPTER: TypeAdapter[ScheduleConfig] = TypeAdapter(ScheduleConfig)


def schedule(kind: str, num_steps: int, **options: object) -> list[float]:
    """Multipliers of steps 0 … num_steps, the last being the end of the run, which no update uses."""
    multiplier = build_schedule(ADAPTER.validate_python({"lr_scheduler_type": kind, **options}), num_steps)
    return [multiplier(step) for step in range(num_steps + 1)]


def test_warmup_by_hand() -> None:
    """W = 4: 1/4, 2/4, 3/4, 4/4; the first step learns."""
    assert schedule("constant", 6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_linear_by_hand() -> None:
    """W = 1, N = 5: 1 at steps 0 and 1, then down by 1/4 a step; the last step taken, 4, is at 1/4."""
    assert schedule("linear", 5, warmup_steps=1) == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_linear_to_a_floor_by_hand() -> None:
    """0.2 + 0.8 · (1, 3/4, 1/2, 1/4, 0)."""
    assert schedule("linear", 4, min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_by_hand() -> None:
    """(1 + cos πt)/2 at t = 0, 1/4, 1/2, 3/4, 1 is 1, (2+√2)/4, 1/2, (2-√2)/4, 0; floor 0.5 halves the way down."""
    root = math.sqrt(2)
    plain = [1, (2 + root) / 4, 0.5, (2 - root) / 4, 0]
    assert schedule("cosine", 4) == pytest.approx(plain, abs=1e-12)
    assert schedule("cosine", 4, min_lr_ratio=0.5) == pytest.approx([0.5 + 0.5 * x for x in plain], abs=1e-12)


def test_inverse_sqrt_by_hand() -> None:
    """W = 4 is the timescale too: at s = 4, 12 √(4/4), √(4/12). Timescale 1 without warm-up: 1/√(1+s)."""
    values = schedule("inverse_sqrt", 12, warmup_steps=4)
    assert (values[4], values[12]) == pytest.approx((1.0, math.sqrt(1 / 3)))
    assert schedule("inverse_sqrt", 3, timescale=1) == pytest.approx([1 / math.sqrt(1 + s) for s in range(4)])
    assert schedule("inverse_sqrt", 2)[2] == pytest.approx(math.sqrt(10_000 / 10_002))


@pytest.mark.parametrize(
    ("decay_type", "down"),
    [
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0]),
        ("1-sqrt", [1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0]),
    ],
)
def test_warmup_stable_decay_by_hand(decay_type: str, down: list[float]) -> None:
    """N = 10, W = 2, decay over 0.4 · 10 = 4 steps: stable to step 6."""
    found = schedule("warmup_stable_decay", 10, warmup_steps=2, decay_ratio=0.4, decay_type=decay_type)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, *down], abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "hf_kind", "options", "hf_options"),
    [
        ("constant", "constant_with_warmup", {}, {}),
        ("linear", "linear", {}, {}),
        ("cosine", "cosine", {}, {}),
        ("cosine", "cosine_with_min_lr", {"min_lr_ratio": 0.1}, {"min_lr_rate": 0.1}),
        ("inverse_sqrt", "inverse_sqrt", {}, {}),
        (
            "warmup_stable_decay",
            "warmup_stable_decay",
            {"decay_ratio": 0.25, "decay_type": "linear", "min_lr_ratio": 0.1},
            {"num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.1},
        ),
    ],
)
@pytest.mark.parametrize("warmup", [0, 7])
def test_after_the_warmup_it_is_transformers(
    kind: str, hf_kind: str, options: dict[str, object], hf_options: dict[str, object], warmup: int
) -> None:
    """N = 40. In the warm-up transformers is one step behind and spends step 0 at learning rate 0.

    (Its warmup_stable_decay starts the warm-up from the floor instead; ours rises alike for every schedule.)
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(hf_kind, optimizer, warmup, 40, scheduler_specific_kwargs=hf_options).lr_lambdas[0]
    ours = schedule(kind, 40, warmup_steps=warmup, **options)
    assert ours[warmup:40] == pytest.approx([theirs(step) for step in range(warmup, 40)], abs=1e-12)
    if warmup and kind != "warmup_stable_decay":
        assert theirs(0) == 0.0
        assert ours[: warmup - 1] == pytest.approx([theirs(step) for step in range(1, warmup)])


KINDS = st.sampled_from(["constant", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay"])
DECAYING = ("linear", "cosine", "warmup_stable_decay")


@settings(deadline=None)
@given(data=st.data(), kind=KINDS, num_steps=st.integers(1, 400), floor=st.floats(0, 1))
def test_every_schedule(data: st.DataObject, kind: str, num_steps: int, floor: float) -> None:
    """In [0, 1]; never 0 in a step that is taken; rises, then never rises; no jumps; ends on its floor and stays."""
    decay_ratio = data.draw(st.floats(0.05, 1))
    decay_type = data.draw(st.sampled_from(["linear", "cosine", "1-sqrt"]))
    warmup = data.draw(st.integers(0, num_steps - 1))
    options: dict[str, object] = {"warmup_steps": warmup}
    decay_steps = num_steps - warmup
    if kind == "warmup_stable_decay":
        options |= {"decay_ratio": decay_ratio, "decay_type": decay_type}
        decay_steps = math.ceil(decay_ratio * num_steps)
        assume(warmup + decay_steps + 1 <= num_steps)
    if kind in DECAYING:
        options["min_lr_ratio"] = floor
    values = schedule(kind, num_steps, **options)

    assert all(0.0 <= value <= 1.0 for value in values)
    assert all(value > 0.0 for value in values[:num_steps])
    up, down = values[: warmup + 1], values[warmup:]
    assert up == sorted(up)
    assert all(later <= earlier + 1e-15 for earlier, later in pairwise(down))
    assert values[warmup] == pytest.approx(1.0)
    if warmup:
        assert values[0] == 1 / warmup
    if kind in DECAYING:
        assert values[num_steps] == floor
        build = build_schedule(ADAPTER.validate_python({"lr_scheduler_type": kind, **options}), num_steps)
        assert build(num_steps + 100) == floor
        # The steepest shapes: cosine π/2 and 1-sqrt's first step √(1/D), of the way down.
        steepest = max(math.pi / 2 / decay_steps, math.sqrt(1 / decay_steps))
        assert all(abs(a - b) <= steepest + 1e-12 for a, b in pairwise(down))


@pytest.mark.parametrize(
    ("ratio", "num_steps", "expected"),
    [
        (0.07, 100, 7),  # 0.07 · 100 is 7.000000000000001 in floats, whose ceiling is 8
        (0.1, 30, 3),
        (0.1, 25, 3),
        (1e-4, 100, 1),
        (0.0, 100, 0),
        (1.0, 13, 13),
    ],
)
def test_warmup_ratio_is_exact_and_rounds_up(ratio: float, num_steps: int, expected: int) -> None:
    by_ratio = schedule("linear", num_steps, warmup_ratio=ratio)
    assert by_ratio == schedule("linear", num_steps, warmup_steps=expected)


def test_a_warmup_of_the_whole_run_reaches_its_peak_in_the_last_step() -> None:
    assert schedule("linear", 4, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay"])
def test_a_warmup_longer_than_the_run_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.schedule\.warmup_steps: 11 warm-up steps .* run's 10;"):
        schedule(kind, 10, warmup_steps=11)


@pytest.mark.parametrize(
    ("options", "key", "warmup"),
    [({"warmup_steps": 9}, "warmup_steps", 9), ({"warmup_ratio": 0.85}, "warmup_ratio", 9)],
)
def test_warmup_and_decay_that_overlap_are_refused(options: dict[str, object], key: str, warmup: int) -> None:
    with pytest.raises(ConfigError, match=rf"^optimizer\.schedule\.{key}: {warmup} warm-up and 2 decay steps"):
        schedule("warmup_stable_decay", 10, **options)
