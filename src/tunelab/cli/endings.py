"""How a command ends: every exception becomes an exit code and one line on stderr.

0 done, 1 failed, 2 usage or config, 3 data, 4 environment, 5 diverged, 75 preempted, 130 interrupted (see
`tunelab.errors`); 141 when the reader of stdout has gone, as for a process killed by SIGPIPE.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

import typer

from tunelab.errors import (
    EXIT_ENVIRONMENT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Interrupted,
    TunelabError,
    is_out_of_memory,
)

EXIT_BROKEN_PIPE = 128 + 13
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def end(command: Callable[[], None], debug: bool = False) -> int:
    """Run `command`; say on stderr what went wrong, with a traceback if `debug`, and return the exit code."""
    try:
        command()
        sys.stdout.flush()
        return 0
    except typer.Exit as exit_:
        return exit_.exit_code
    except BrokenPipeError:
        # `tunelab runs | head`: no complaint, also not from the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Interrupted as interrupted:
        _say(str(interrupted))
        return interrupted.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = explain(error)
        _say(f"{_error_word()} {message}")
        return code


def explain(error: Exception) -> tuple[str, int]:
    """The one line and the exit code of an exception."""
    if isinstance(error, TunelabError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        return _explain_usage(error), EXIT_USAGE
    if is_out_of_memory(error):
        return (
            "out of memory; `tunelab plan RECIPE` forecasts what fits, e.g. with training.gradient_checkpointing=true, "
            "adapter.name=lora or a smaller data.max_length",
            EXIT_ENVIRONMENT,
        )
    if _is_disk_full(error):
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return f"{where}no space left on the disk; free some, or choose another training.output_dir", EXIT_ENVIRONMENT
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: permission denied; choose a place you may write to", EXIT_ENVIRONMENT
    told = " ".join(str(error).split())
    told = f"{type(error).__name__}: {told[:300]}" if told else type(error).__name__
    return f"unexpected {told}; run again with --debug", EXIT_FAILED


def _explain_usage(error: typer.TyperException) -> str:
    """typer's words for a wrong command line, on one line, with the nearest option and where to read on."""
    message = " ".join(error.format_message().split()).rstrip(".")
    message = re.sub(r" \(Possible options: (--[\w-]+).*\)", r" (did you mean '\1'?)", message)
    message = message.replace("No such option: ", "no such option ").replace("(s)", "")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "tunelab"
    return f"{message[:1].lower()}{message[1:]}; see {path} --help"


def _is_disk_full(error: Exception) -> bool:
    """An OSError that says so, or safetensors' own class, which tells it in words (`os error 28`)."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return "No space left on device" in str(error)


def _error_word() -> str:
    from tunelab.cli.output import paint

    return paint("error:", "31;1", sys.stderr)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
