"""The throughput meter on a clock that the test turns by hand."""

from __future__ import annotations

import math

import pytest

from tunelab.cost import ThroughputMeter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def test_window_and_overall() -> None:
    """10 tokens in 1 s, 10 in 2 s, 30 in 2 s: 50 in 5 s overall, 40 in 4 s over the last two."""
    clock = Clock()
    meter = ThroughputMeter(window=2, clock=clock)
    for tokens, seconds in ((10, 1.0), (10, 2.0), (30, 2.0)):
        clock.advance(seconds)
        meter.update(tokens)
    assert meter.tokens_per_second == 10.0
    assert meter.overall_tokens_per_second == 10.0
    clock.advance(1.0)
    meter.update(60)
    assert meter.tokens_per_second == 30.0
    assert meter.overall_tokens_per_second == pytest.approx(110 / 6)
    assert (meter.tokens, meter.seconds) == (110, 6.0)


def test_pauses_are_not_training_time() -> None:
    """A step of 1 + 1 s around pauses of 50 and 7 s; the next step is unpaused again."""
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    clock.advance(1.0)
    with meter.pause():
        clock.advance(50.0)
    with meter.pause():
        clock.advance(7.0)
    clock.advance(1.0)
    meter.update(20)
    assert meter.tokens_per_second == 10.0
    clock.advance(1.0)
    meter.update(20)
    assert (meter.tokens, meter.seconds) == (40, 3.0)


def test_a_pause_that_fails_still_ends() -> None:
    clock = Clock()
    meter = ThroughputMeter(clock=clock)

    def interrupted() -> None:
        with meter.pause():
            clock.advance(50.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    clock.advance(2.0)
    meter.update(20)
    assert meter.seconds == 2.0


def test_before_the_first_step_there_is_no_rate() -> None:
    meter = ThroughputMeter(clock=Clock())
    assert math.isnan(meter.tokens_per_second)
    assert math.isnan(meter.overall_tokens_per_second)
