"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second quits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tunelab.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED


class StopSignal:
    """Whether a stop was asked for, and the exit code it means (130 for Ctrl-C, 75 for SIGTERM)."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        return EXIT_PREEMPTED if self.received == signal.SIGTERM else EXIT_INTERRUPTED


@contextmanager
def catch_stop_signals() -> Iterator[StopSignal]:
    """Within the body, a first SIGINT or SIGTERM is only noted; a second ends the process at once.

    Outside the main thread (a notebook's worker, a test) signals cannot be caught and are left alone.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.received = number
        # Unbuffered, as a handler must be: a person who hears nothing presses again, and kills the save.
        os.write(2, b"\nstopping: this step ends, then the run is saved; once more quits at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
