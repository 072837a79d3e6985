"""Work in portions that the memory has room for: where one does not fit, half as much at a time from there on.

Only for work whose result does not depend on how it is cut up, beyond rounding: scoring, evaluation, generation. The
training step has its own rule, because its gradients add up over the portions (`training/step.py`).

On Linux a CPU's memory usually ends without an error to answer: the kernel kills the process. What is caught here are
limits that allocation meets (a container's address space, `ulimit -v`, strict overcommit) and the memory of a card.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from tunelab.errors import OutOfMemory, is_out_of_memory

T = TypeVar("T")

OnHalved = Callable[[int], None]
"""Told the new size."""


def in_portions(
    ids: Sequence[int], size: int, work: Callable[[list[int]], T], *, what: str, on_halved: OnHalved
) -> Iterator[T]:
    """`work` on `ids` in order, `size` at a time; halved for good whenever a portion does not fit in memory.

    The portion that failed is taken again: `work` must leave nothing behind when it fails. Raises OutOfMemory, which
    calls the work `what`, if one alone does not fit.
    """
    start = 0
    while start < len(ids):
        rest = list(ids[start : start + size])

        def first(count: int, rest: list[int] = rest) -> tuple[int, T]:
            return count, work(rest[:count])

        taken, result = fit(len(rest), first, what, on_halved)
        start += taken
        if taken < len(rest):
            size = taken
        yield result


def fit(size: int, work: Callable[[int], T], what: str, on_halved: OnHalved) -> T:
    """`work(size)`, or of half that, and so on, until the memory is enough. Raises OutOfMemory where 1 is too much."""
    while True:
        try:
            return work(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Only here, the error gone, are the frames gone that held what filled the memory.
        release_memory()
        if size == 1:
            raise OutOfMemory(f"out of memory: {what} does not fit with one record at a time")
        size //= 2
        on_halved(size)


def release_memory() -> None:
    """Hand back what Python, torch and the C library hold and nobody uses, before the next attempt."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc; `parallel.keep_freed_memory` has it keep what is freed
        library.malloc_trim(0)
