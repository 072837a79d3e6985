"""Commands in a real terminal (a pseudo-terminal of 80 columns), as a child process."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.cli.conftest import RECIPES, SMALL

PATIENCE = 120.0
"""Seconds until a test gives up waiting; torch may take ten to import on a busy machine."""


class TerminalSession:
    """A child on a pseudo-terminal: type, and wait for text."""

    def __init__(self, words: list[str], cwd: Path) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
            environment.pop(name, None)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tunelab", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, pattern: str) -> str:
        """Read until `pattern` is shown; everything shown so far."""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.shown):
            assert time.monotonic() < end, f"{pattern!r} never came: {self.shown}"
            self._read()
        return self.shown

    def _read(self) -> bool:
        if not select.select([self.master], [], [], 1.0)[0]:
            return True
        try:
            chunk = os.read(self.master, 65536)
        except OSError:  # EIO: the child has closed its side
            return False
        self.shown += chunk.decode("utf-8", "replace")
        return bool(chunk)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        """Read to the end; the exit code. A child that does not end is killed, and fails the test."""
        end = time.monotonic() + PATIENCE
        while self._read() and self.child.poll() is None:
            if time.monotonic() > end:
                self.child.kill()
        self._read()
        os.close(self.master)
        return self.child.wait(PATIENCE)


@pytest.mark.timeout(200)
def test_training_shows_a_bar_and_ctrl_c_saves(tmp_path: Path) -> None:
    words = ["sft", str(RECIPES / "tiny-sft.yaml"), *SMALL[:2], "training.max_steps=5000", "training.run_name=x"]
    terminal = TerminalSession([*words, "evaluation.eval_steps=5000"], tmp_path)
    shown = terminal.wait_for(r"training .*━.* \d+/5,000 .*left.*loss")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert re.search(r"training [\d,]+/5,000 .* stopped in", terminal.shown)
    assert "continue with: tunelab sft --resume runs/x" in terminal.shown.replace("\r\n", "")
    assert "\x1b[?25l" in shown  # the cursor was hidden,
    assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l")  # and is back
    assert "Traceback" not in terminal.shown


@pytest.mark.timeout(200)
def test_a_conversation(tmp_path: Path) -> None:
    terminal = TerminalSession(["chat", "tiny-gpt2", "--max-new-tokens", "4", "--device", "cpu"], tmp_path)
    terminal.wait_for(r"turns as transcript; /help lists the commands")
    terminal.wait_for(r"> $")
    terminal.type("Hello\n")
    terminal.wait_for(r"Hello\r\n(?s:.*)> $")
    terminal.type("/reset\n")
    terminal.wait_for(r"The session starts anew\.(?s:.*)> $")  # readline reads again: before, Ctrl-D would be lost
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.shown


@pytest.mark.timeout(200)
def test_tables_fit_and_colour_is_for_terminals(runs_dir: Path, tmp_path: Path) -> None:
    words = ["runs", "compare", *([str(runs_dir / "sft"), str(runs_dir / "dpo")] * 3)]
    terminal = TerminalSession(words, tmp_path)
    assert terminal.end() == 0
    assert "\x1b[1m" in terminal.shown
    lines = re.sub(r"\x1b\[\d*m", "", terminal.shown).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("…" in line for line in lines)
    plain = TerminalSession(["--color", "never", *words], tmp_path)
    assert plain.end() == 0
    assert "\x1b" not in plain.shown
