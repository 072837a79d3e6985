"""Errors a person can mend, and the exit code each family ends the process with.

Every message is one line: what is wrong, where (file:line or key path), and how to mend it. The command line
prints it without a traceback (unless `--debug`) and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_ENVIRONMENT = 4
EXIT_DIVERGED = 5
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class TunelabError(ValueError):
    """Base of every error meant for the user."""

    exit_code = EXIT_FAILED


class ConfigError(TunelabError):
    """A recipe, override or command-line option that cannot be accepted."""

    exit_code = EXIT_USAGE


class DataError(TunelabError):
    """A record, file or data set that cannot be trained on."""

    exit_code = EXIT_DATA


class MachineError(TunelabError):
    """The machine lacks something: memory, disk, network, a package, a device."""

    exit_code = EXIT_ENVIRONMENT


class OutOfMemory(MachineError):  # noqa: N818  (torch's own class has the longer name)
    """The memory is too small for one record alone, or for something that cannot be made smaller."""


class DivergedError(TunelabError):
    """A loss or gradient stopped being finite."""

    exit_code = EXIT_DIVERGED


class Interrupted(TunelabError):  # noqa: N818  (an ending, not a mistake)
    """The run was stopped by a signal after saving; it can be resumed.

    `exit_code` is 130 for Ctrl-C (SIGINT) and 75 for SIGTERM (a scheduler's preemption).
    """

    def __init__(self, message: str, exit_code: int = EXIT_INTERRUPTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: ",  # torch on a CPU: "can't allocate memory", elsewhere "not enough memory"
    "MPS backend out of memory",
    "CUDA error: out of memory",  # kernels of other libraries (bitsandbytes)
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
"""What a RuntimeError says for want of memory, by library. torch's allocator on CUDA has a class of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library gave up for want of memory. Its classes are told by name: torch may not be loaded."""
    if isinstance(error, MemoryError) or any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or an empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
