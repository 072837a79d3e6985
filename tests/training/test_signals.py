"""The first signal is noted and answered, the second is obeyed at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tunelab.training.signals import catch_stop_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_the_first_signal_is_noted_and_answered(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with catch_stop_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.exit_code == code
    assert "once more quits at once" in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_the_second_signal_ends_the_process() -> None:
    program = (
        "import os, signal, time\n"
        "from tunelab.training.signals import catch_stop_signals\n"
        "with catch_stop_signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(30)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGTERM


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen: list[bool] = []

    def body() -> None:
        with catch_stop_signals() as stop:
            seen.append(stop())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]
