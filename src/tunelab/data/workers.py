"""Processes that work on blocks of records beside this one.

Why not multiprocessing: its processes import the user's main module again (a script without the `__main__` guard
breaks), fork warns about the tokenizer's threads, and its workers outlive a killed parent. These are plain Python
processes that run `main`: they are sent what they need through their stdin, answer through their stdout, and end when
their stdin does. What passes is pickled, between processes of one program; no pickle is ever read from a file.

Blocks go round: worker w of n gets blocks w, w + n, …, one at a time, so results come back in order and no more than
2 n blocks are in memory.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Self, TypeVar

from tunelab.errors import MachineError, TunelabError

T = TypeVar("T")


class Workers:
    """`number` processes that each hold `function` and `argument`; a context manager that ends them.

    `function(item, argument)` must be picklable and so must what it takes and returns.
    """

    def __init__(self, number: int, function: Callable[[Any, Any], Any], argument: Any) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",  # there is a process for each core already
            "OMP_NUM_THREADS": "1",
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent, which decides what becomes of the work
            )
            for _ in range(number)
        ]
        try:
            for process in self._processes:
                _send(process, (function, argument))
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()

    def map(self, items: Iterable[T], of: Callable[[T], Any]) -> Iterator[tuple[T, Any]]:
        """(item, what the function makes of `of(item)`) for each item, in their order.

        Raises MachineError if a process ends before it has answered. A TunelabError of `items` itself is raised after
        the results of all items before it, as it would be in one process.
        """
        waiting: deque[tuple[subprocess.Popen[bytes], T]] = deque()
        free = deque(self._processes)
        source, failed = iter(items), None
        while True:
            try:
                item = next(source)
            except StopIteration:
                break
            except TunelabError as error:
                failed = error
                break
            if free:
                process = free.popleft()
                _send(process, of(item))
                waiting.append((process, item))
                continue
            process, done = waiting.popleft()
            result = _receive(process)
            _send(process, of(item))
            waiting.append((process, item))
            yield done, result
        for process, done in waiting:
            yield done, _receive(process)
        if failed is not None:
            raise failed

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()


def _send(process: subprocess.Popen[bytes], value: Any) -> None:
    assert process.stdin is not None
    try:
        pickle.dump(value, process.stdin, pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()
    except BrokenPipeError:
        raise _ended(process) from None


def _receive(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    try:
        return pickle.load(process.stdout)
    except EOFError:
        raise _ended(process) from None


def _ended(process: subprocess.Popen[bytes]) -> MachineError:
    return MachineError(
        f"a process that tokenises data ended early (exit code {process.wait()}); if the machine ran out of memory, "
        "run on fewer cores (taskset -c 0 tunelab …)"
    )


def main() -> None:
    """What a process does."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever a library prints must not get between the answers
        _work(sys.stdin.buffer, answers)


def _work(requests: BinaryIO, answers: BinaryIO) -> None:
    function, argument = pickle.load(requests)
    while True:
        try:
            item = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(function(item, argument), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
