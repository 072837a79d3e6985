"""Meters of a running training: how fast it goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ThroughputMeter:
    """Tokens per second of training, with evaluation, saving and the like left out.

    Made when training starts; `update` is called at the end of each optimizer step. On CUDA work is queued ahead of
    the clock: a window of several steps is right to within the queue's length, a single step is not.
    """

    def __init__(self, window: int = 10, clock: Callable[[], float] = time.perf_counter) -> None:
        """`window` is the number of latest steps that `tokens_per_second` looks at."""
        self._clock = clock
        self._last = clock()
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)
        self._paused = 0.0
        self.tokens = 0
        self.seconds = 0.0

    def update(self, tokens: int) -> None:
        """A step that trained on `tokens` has ended."""
        now = self._clock()
        elapsed = now - self._last - self._paused
        self._last, self._paused = now, 0.0
        self._steps.append((tokens, elapsed))
        self.tokens += tokens
        self.seconds += elapsed

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside is not training time. Not re-entrant."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    @property
    def tokens_per_second(self) -> float:
        """Over the window's steps. NaN before the first."""
        return _rate(sum(t for t, _ in self._steps), sum(s for _, s in self._steps))

    @property
    def overall_tokens_per_second(self) -> float:
        """Over all steps. NaN before the first."""
        return _rate(self.tokens, self.seconds)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else float("nan")
