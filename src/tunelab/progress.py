"""Progress of long work, on stderr: silent, as plain lines, or as a live bar.

Work of any room reports through the `Progress` protocol and never asks where its words end up. Rates and remaining
times come from an injected clock (seconds, monotonic), so that they are tested without waiting.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import TaskID

Clock = Callable[[], float]

WINDOW = 32
"""Advances the rate is measured over: old enough to be steady, young enough to forget a slow first step."""

PLAIN_SECONDS = 5.0
PLAIN_FRACTION = 0.1
"""A plain line is due after this share of the task (and a second) ..."""
PLAIN_GROWTH = 1 / 50
"""... or after PLAIN_SECONDS, stretched to this share of the elapsed time: a day takes 350 lines, not 17280."""


class Progress(Protocol):
    """What a room may say while it works. A task is named by its text; tasks may overlap."""

    def note(self, text: str) -> None:
        """Say one line, e.g. a decision taken or a record dropped."""

    def start(self, task: str, total: int, done: int = 0) -> None:
        """Begin `task` of `total` units, of which `done` were finished earlier (a resumed run)."""

    def advance(self, task: str, amount: int = 1, **numbers: float) -> None:
        """`amount` more units are done. `numbers` (loss, tokens_per_second, peak_bytes, …) stay until replaced."""

    def finish(self, task: str) -> None:
        """`task` is over, complete or not. It leaves a line behind, unless it was part of another task."""

    def close(self) -> None:
        """No more words; the terminal is left as it was found. May be called twice."""


class Meter:
    """Counts one task and forecasts its end."""

    def __init__(self, total: int, done: int, clock: Clock) -> None:
        self.total, self.done = total, done
        self._clock = clock
        self.started = clock()
        self._seen: deque[tuple[float, int]] = deque([(self.started, done)], maxlen=WINDOW)
        self.numbers: dict[str, float] = {}

    def advance(self, amount: int, numbers: Mapping[str, float]) -> None:
        self.done += amount
        self.numbers.update(numbers)
        self._seen.append((self._clock(), self.done))

    @property
    def elapsed(self) -> float:
        """Seconds since the task started."""
        return self._clock() - self.started

    @property
    def fraction(self) -> float:
        return self.done / self.total if self.total else 1.0

    def rate(self) -> float | None:
        """Units a second over the last `WINDOW` advances, or None before there is anything to divide."""
        (first_time, first_done), (last_time, last_done) = self._seen[0], self._seen[-1]
        if last_time <= first_time or last_done <= first_done:
            return None
        return (last_done - first_done) / (last_time - first_time)

    def remaining(self) -> float | None:
        """Forecast seconds to the end: what is left over the rate, less the time since the last advance."""
        rate = self.rate()
        if rate is None:
            return None
        waited = self._clock() - self._seen[-1][0]
        return max((self.total - self.done) / rate - waited, 0.0)


def format_seconds(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`, `3d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_bytes(count: float) -> str:
    """`512 B`, `3.4 GiB`: binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_number(name: str, value: float) -> str:
    """One named number with its unit, e.g. `loss 2.314`, `1,250 tok/s`, `2.1 GiB`, `learning_rate 1.2e-05`."""
    short = name.rsplit("/", 1)[-1]
    if short.endswith("tokens_per_second"):
        return f"{value:,.0f} tok/s"
    if short.endswith("bytes"):
        return format_bytes(value)
    if short == "records":
        return f"{value:,.0f} records"
    return f"{short} {value:.4g}"


def _format_numbers(numbers: Mapping[str, float]) -> str:
    return " · ".join(format_number(name, value) for name, value in numbers.items())


def _ending(meter: Meter) -> str:
    return f"{'done' if meter.done >= meter.total else 'stopped'} in {format_seconds(meter.elapsed)}"


def _line(*parts: str) -> str:
    return " · ".join(part for part in parts if part)


def _left(meter: Meter) -> str:
    remaining = meter.remaining()
    return f"{format_seconds(remaining)} left" if remaining is not None else ""


def _count(meter: Meter) -> str:
    return f"{meter.done:,}/{meter.total:,}"


class SilentProgress:
    """Says nothing (`--quiet`, tests)."""

    def note(self, text: str) -> None: ...

    def start(self, task: str, total: int, done: int = 0) -> None: ...

    def advance(self, task: str, amount: int = 1, **numbers: float) -> None: ...

    def finish(self, task: str) -> None: ...

    def close(self) -> None: ...


class PlainProgress:
    """Whole lines for logs and pipes: one at most every few seconds or tenth of a task, and one at its end."""

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._meters: dict[str, Meter] = {}
        self._said: dict[str, tuple[float, float]] = {}  # task → (time, fraction) of its last line

    def note(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def start(self, task: str, total: int, done: int = 0) -> None:
        meter = self._meters[task] = Meter(total, done, self._clock)
        self._said[task] = (meter.started, meter.fraction)

    def advance(self, task: str, amount: int = 1, **numbers: float) -> None:
        meter = self._meters[task]
        meter.advance(amount, numbers)
        said_at, said_fraction = self._said[task]
        silence = self._clock() - said_at
        due = silence >= max(PLAIN_SECONDS, PLAIN_GROWTH * meter.elapsed) or (
            meter.fraction - said_fraction >= PLAIN_FRACTION and silence >= 1.0
        )
        if due and meter.done < meter.total:
            self._said[task] = (self._clock(), meter.fraction)
            self._say(task, meter, _left(meter))

    def finish(self, task: str) -> None:
        meter = self._meters.pop(task)
        del self._said[task]
        if not self._meters:
            self._say(task, meter, _ending(meter))

    def close(self) -> None: ...

    def _say(self, task: str, meter: Meter, tail: str) -> None:
        self.note(_line(f"{task} {_count(meter)}", _format_numbers(meter.numbers), tail))


class TerminalProgress:
    """A live bar for people: count, numbers and remaining time, in one line whatever the width."""

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        self._clock = clock
        self._console = Console(file=stream if stream is not None else sys.stderr, highlight=False)
        # stdout is for results and stays untouched: rich would otherwise route it to this console, stderr.
        self._bars = Bars(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(min_width=8, max_width=24, ratio=1)),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,
            expand=True,
        )
        self._meters: dict[str, tuple[Meter, TaskID]] = {}

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def start(self, task: str, total: int, done: int = 0) -> None:
        if not self._meters:
            self._bars.start()
        meter = Meter(total, done, self._clock)
        bar = self._bars.add_task(task, total=total, completed=done, text=self._text(meter))
        self._meters[task] = (meter, bar)

    def advance(self, task: str, amount: int = 1, **numbers: float) -> None:
        meter, bar = self._meters[task]
        meter.advance(amount, numbers)
        self._bars.update(bar, completed=meter.done, text=self._text(meter))

    def finish(self, task: str) -> None:
        meter, bar = self._meters.pop(task)
        self._bars.remove_task(bar)
        if not self._meters:
            self._bars.stop()
            self.note(_line(f"{task} {_count(meter)}", _format_numbers(meter.numbers), _ending(meter)))

    def close(self) -> None:
        self._bars.stop()
        self._meters.clear()

    @staticmethod
    def _text(meter: Meter) -> str:
        return _line(_count(meter), _left(meter), _format_numbers(meter.numbers))


def choose_progress(quiet: bool = False) -> Progress:
    """Silent if `quiet`, a live bar where stderr is a capable terminal, else plain lines."""
    if quiet:
        return SilentProgress()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return TerminalProgress()
    return PlainProgress()
