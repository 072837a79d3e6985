"""What a person sees while waiting, with a clock that the tests move."""

from __future__ import annotations

import io
import sys

import pytest

from tunelab.progress import (
    Meter,
    PlainProgress,
    SilentProgress,
    TerminalProgress,
    choose_progress,
    format_bytes,
    format_number,
    format_seconds,
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (60, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (86400 * 3 + 4 * 3600, "3d04h")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 B"), (2048, "2.0 KiB"), (3.4 * 2**30, "3.4 GiB"), (5 * 2**40, "5.0 TiB")]
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("train/loss", 2.31449, "loss 2.314"),
        ("tokens_per_second", 12345.6, "12,346 tok/s"),
        ("memory/peak_bytes", 2**31, "2.0 GiB"),
        ("learning_rate", 1.2e-5, "learning_rate 1.2e-05"),
    ],
)
def test_format_number(name: str, value: float, text: str) -> None:
    assert format_number(name, value) == text


class TestMeter:
    def test_knows_nothing_before_the_first_advance(self) -> None:
        meter = Meter(10, 0, Clock())
        assert meter.rate() is None
        assert meter.remaining() is None

    def test_rate_and_remaining(self) -> None:
        """4 units in 8 s are 0.5 a second; the 6 that are left take 12 s, of which 3 s have gone by since."""
        clock = Clock()
        meter = Meter(10, 0, clock)
        clock.now += 8
        meter.advance(4, {})
        assert meter.rate() == 0.5
        clock.now += 3
        assert meter.remaining() == 9.0

    def test_units_done_before_do_not_count_as_speed(self) -> None:
        """A run resumed at 90 of 100 does 2 in 4 s: 0.5 a second and 16 s to go, not 92 in 4 s."""
        clock = Clock()
        meter = Meter(100, 90, clock)
        clock.now += 4
        meter.advance(2, {})
        assert meter.rate() == 0.5
        assert meter.remaining() == 16.0

    def test_a_slow_start_is_forgotten(self) -> None:
        """The first step takes 100 s (compiling), the others 1 s: after a window of them the rate is 1 a second."""
        clock = Clock()
        meter = Meter(1000, 0, clock)
        clock.now += 100
        meter.advance(1, {})
        for _ in range(40):
            clock.now += 1
            meter.advance(1, {})
        assert meter.rate() == 1.0

    def test_an_empty_task_is_complete(self) -> None:
        assert Meter(0, 0, Clock()).fraction == 1.0

    def test_never_less_than_nothing_is_left(self) -> None:
        clock = Clock()
        meter = Meter(4, 0, clock)
        clock.now += 1
        meter.advance(3, {})
        clock.now += 60
        assert meter.remaining() == 0.0


class TestPlainProgress:
    def test_first_middle_and_last_lines(self) -> None:
        """100 steps of 2 s: a line every tenth of the task would be every 20 s, so 5 s of silence decide: 3 steps."""
        stream, clock = io.StringIO(), Clock()
        progress = PlainProgress(stream, clock)
        progress.start("training", 100)
        for _ in range(3):
            clock.now += 2
            progress.advance("training", loss=2.5, tokens_per_second=1234.0, peak_bytes=2**30)
        assert stream.getvalue() == "training 3/100 · loss 2.5 · 1,234 tok/s · 1.0 GiB · 3m14s left\n"
        for _ in range(97):
            clock.now += 2
            progress.advance("training", loss=1.0)
        progress.finish("training")
        last = stream.getvalue().splitlines()[-1]
        assert last == "training 100/100 · loss 1 · 1,234 tok/s · 1.0 GiB · done in 3m20s"

    def test_fast_tasks_say_one_line(self) -> None:
        stream, clock = io.StringIO(), Clock()
        progress = PlainProgress(stream, clock)
        progress.start("tokenising", 1000)
        for _ in range(1000):
            clock.now += 0.0005
            progress.advance("tokenising")
        progress.finish("tokenising")
        assert stream.getvalue() == "tokenising 1,000/1,000 · done in 0s\n"

    def test_a_day_of_training_takes_hundreds_of_lines(self) -> None:
        """1 s a step for a day. Until 250 s a line every 5 s (50 lines), then at intervals of a 50th of the elapsed
        time: 50 x ln(86400 / 250) = 292 more. A tenth of the task, 8640 s, never decides."""
        stream, clock = io.StringIO(), Clock()
        progress = PlainProgress(stream, clock)
        progress.start("training", 86400)
        for _ in range(86400):
            clock.now += 1
            progress.advance("training")
        assert 300 < len(stream.getvalue().splitlines()) < 360

    def test_a_part_of_a_task_leaves_no_line(self) -> None:
        stream, clock = io.StringIO(), Clock()
        progress = PlainProgress(stream, clock)
        progress.start("training", 2)
        progress.start("evaluation", 1)
        progress.advance("evaluation")
        progress.finish("evaluation")
        assert stream.getvalue() == ""
        progress.finish("training")
        assert stream.getvalue() == "training 0/2 · stopped in 0s\n"

    def test_notes_are_lines(self) -> None:
        stream = io.StringIO()
        PlainProgress(stream).note("3 records dropped")
        assert stream.getvalue() == "3 records dropped\n"

    def test_no_control_characters(self) -> None:
        stream, clock = io.StringIO(), Clock()
        progress = PlainProgress(stream, clock)
        progress.start("x", 10)
        for _ in range(10):
            clock.now += 6
            progress.advance("x", loss=float("nan"))
        progress.finish("x")
        assert stream.getvalue().replace("\n", "").isprintable()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 80, 200])
def test_terminal_bar_fits_the_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is said, no line is wider than the terminal, and the numbers are among them where there is room."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    stream, clock = Terminal(), Clock()
    progress = TerminalProgress(stream, clock)
    progress.start("training", 100)
    clock.now += 10
    progress.advance("training", 5, loss=2.5, tokens_per_second=1234.0, peak_bytes=2**30)
    lines = progress._bars.get_renderable()
    shown = "".join(segment.text for segment in progress._console.render(lines))
    assert all(len(line) <= width for line in shown.splitlines())
    assert "5/100" in shown
    assert ("1,234 tok/s" in shown) == (width >= 80)
    progress.finish("training")
    progress.close()
    assert "stopped in 10s" in stream.getvalue()


def test_terminal_note_is_not_markup() -> None:
    stream = Terminal()
    progress = TerminalProgress(stream)
    progress.note("drops [bold]nothing[/] [x")
    assert "drops [bold]nothing[/] [x" in stream.getvalue()


def test_terminal_leaves_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would take over sys.stdout while a bar is live, and results would land on stderr."""
    progress = TerminalProgress(Terminal())
    progress.start("x", 1)
    print("a result")
    progress.close()
    assert capsys.readouterr().out == "a result\n"


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_progress(quiet=True), SilentProgress)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(choose_progress(), PlainProgress)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose_progress(), TerminalProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose_progress(), PlainProgress)


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SilentProgress()
    progress.note("x")
    progress.start("x", 1)
    progress.advance("x", loss=1.0)
    progress.finish("x")
    progress.close()
    assert capsys.readouterr() == ("", "")
