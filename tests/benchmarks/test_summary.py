"""Medians, ratios and the comparison of losses, against figures worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.summary import compare, compare_losses, paired_ratio, spread, steady_steps, summarise_side

MIB = 2**20


def run(steps: list[float], *, setup: float = 1.0, ceiling: float = 1e12, peak: int = 100 * MIB) -> dict[str, Any]:
    return {
        "step_seconds": steps,
        "seconds_to_n": setup + sum(steps),
        "seconds": {"reference": 0.5},
        "ceiling": {"best": ceiling},
        "memory": {"imports": 7, "peak": peak + 7, "peak_above_imports": peak},
        "cpu_share": 1.0,
        "losses": [2.0, 1.0],
    }


COUNTS: dict[str, Any] = {
    "real_tokens": (1000, 1000, 600, 1400),
    "floors": (10**11, 10**11, 10**11, 3 * 10**11),
    "reference_floors": (0, 0, 0, 4 * 10**11),
    "batch_size": 8,
}


def test_figures_of_a_side() -> None:
    """Warm-up of 9 s left out: 24 examples, 3000 tokens and 5e11 FLOPs in 1 s + 1 s + 2 s. To step 4 it is 14 s with
    setup, in which 6e11 of training and 4e11 of reference are done. Three quarters of the reference's 0.5 s belong to
    the 24."""
    figures = summarise_side([run([9.0, 1.0, 1.0, 2.0])], **COUNTS)
    medians = {name: figure["median"] for name, figure in figures.items()}
    assert medians == {
        "examples_per_second": 6.0,
        "examples_per_second_all": pytest.approx(24 / 4.375),
        "tokens_per_second": 750.0,
        "step_seconds": 1.0,
        "seconds_to_n": 14.0,
        "reference_seconds": 0.5,
        "ceiling_share": pytest.approx(0.125),
        "ceiling_share_to_n": pytest.approx(1 / 14),
        "ceiling_flops": 1e12,
        "peak_memory_bytes": 100 * MIB,
        "cpu_share": 1.0,
    }


def test_median_and_spread_over_repeats() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}


def test_cuda_memory_is_what_was_allocated() -> None:
    one = run([1.0] * 4)
    one["memory"] |= {"cuda_allocated": 5, "cuda_reserved": 9}
    figures = summarise_side([one], **COUNTS)
    assert figures["peak_memory_bytes"]["median"] == figures["cuda_allocated"]["median"] == 5
    assert figures["cuda_reserved"]["median"] == 9


@pytest.mark.parametrize(("steps", "steady"), [(1, [0]), (2, [1]), (3, [1, 2]), (5, [1, 2, 3, 4])])
def test_warm_up_leaves_a_step_over(steps: int, steady: list[int]) -> None:
    assert list(range(steps))[steady_steps(steps)] == steady


def test_each_repeat_of_the_peer_is_set_against_ours_around_it() -> None:
    """The machine halves its speed midway: 4 s → 8 s for us, 12 s → 24 s for them. Around theirs: 4 and 6 … 8."""
    ours = {"seconds": spread([4.0, 4.0, 8.0])}
    theirs = {"seconds": spread([12.0, 24.0])}
    assert paired_ratio(ours, theirs, "seconds", inverse=True)["values"] == [3.0, 4.0]
    assert paired_ratio(ours, theirs, "seconds")["values"] == [4 / 12, 6 / 24]


def test_directions_of_the_ratios() -> None:
    """Twice as fast in half the memory: speeds 2, memory 0.5."""
    ours = summarise_side([run([1.0] * 4, setup=0.0, peak=50 * MIB)] * 2, **COUNTS)
    theirs = summarise_side([run([2.0] * 4, setup=0.0)], **COUNTS)
    medians = {name: figure["median"] for name, figure in compare(ours, theirs).items()}
    assert medians == {
        "examples_per_second": 2.0,
        "examples_per_second_all": pytest.approx((6 + 0.375) / (3 + 0.375)),
        "step_seconds": 2.0,
        "seconds_to_n": 2.0,
        "peak_memory": 0.5,
    }


def test_losses_that_agree_and_losses_that_do_not() -> None:
    ours, close, far = run([1.0]), run([1.0]), run([1.0])
    close["losses"] = [2.0, 1.0 + 5e-5]
    far["losses"] = [2.0, 1.01]
    near = compare_losses([ours, ours], [close], "float32")
    assert near["agree"]
    assert near["max_relative_difference"] == pytest.approx(5e-5, rel=1e-3)
    assert not compare_losses([ours, ours], [far], "float32")["agree"]
    assert compare_losses([ours, ours], [far], "bf16")["agree"]


def test_a_repeat_with_another_loss_is_seen() -> None:
    drifted = run([1.0]) | {"losses": [2.0, 1.5]}
    assert not compare_losses([run([1.0]), drifted], [run([1.0])], "float32")["repeats_agree"]
