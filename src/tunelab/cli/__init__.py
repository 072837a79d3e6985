"""The command line: arguments in, results on stdout, everything else on stderr.

    app.py      the commands and their groups
    endings.py  how a command ends: exit codes and one-line errors
    output.py   JSON, tables and lines on stdout
    commands/   one file a group of commands

Nothing here computes. Heavy rooms are imported inside the commands, so that `tunelab --help` needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `arguments` default to the process's own."""
    from tunelab.cli.app import invoke
    from tunelab.cli.endings import end

    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # anywhere, because one adds it at the end of a command that has just failed
    return end(lambda: invoke([word for word in given if word != "--debug"]), debug)
