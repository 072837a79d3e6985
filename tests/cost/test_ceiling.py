"""The ceiling on a clock turned by hand: what is divided by what, and that nothing else is touched."""

from __future__ import annotations

import itertools

import pytest
import torch

from tunelab.cost import ceiling, matmul_ceiling


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "CPU_SHAPES", ((4, 5, 6), (8, 9, 10)))


class Clock:
    """Every second reading ends a product; products take the given seconds, over and over."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.readings, self.seconds = 100.0, 0, itertools.cycle(seconds)

    def __call__(self) -> float:
        self.readings += 1
        if self.readings % 2 == 0:
            self.now += next(self.seconds)
        return self.now


@pytest.mark.usefixtures("small")
def test_the_fastest_product_after_the_first_counts() -> None:
    """A budget of 1 s a shape. The first shape's warm-up takes 0.125 s, its repeats 0.25, 0.5 and 0.25 s; the second's
    warm-up 0.125, repeats 0.25, 0.5, 0.25: best 0.25 s for 2·8·9·10 FLOPs, warm-up not counted."""
    clock = Clock(0.125, 0.25, 0.5, 0.25)
    assert matmul_ceiling(torch.device("cpu"), torch.float32, seconds=2.0, clock=clock) == 2 * 8 * 9 * 10 / 0.25
    assert clock.readings == 16


@pytest.mark.usefixtures("small")
def test_a_slow_machine_multiplies_twice_a_shape() -> None:
    clock = Clock(3.0)
    assert matmul_ceiling(torch.device("cpu"), torch.float32, clock=clock) == 2 * 8 * 9 * 10 / 3.0
    assert clock.readings == 8


@pytest.mark.usefixtures("small")
def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    assert matmul_ceiling(torch.device("cpu"), torch.bfloat16, seconds=0.0) > 0
    assert torch.equal(before, torch.get_rng_state())
