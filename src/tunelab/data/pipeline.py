"""Blocks of a source → chunks of tokenised records, in the source's order, on all cores where that pays."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from tunelab.data.collecting import Chunk
from tunelab.data.encoding import Tokenizer
from tunelab.data.reading import Block
from tunelab.data.records import convert_rows
from tunelab.data.sources import Part
from tunelab.data.tokenising import Settings, tokenise
from tunelab.data.workers import Workers

IN_PROCESS = 4096
"""Records tokenised before other processes are started: these need half a second each to import what they use."""

MAX_WORKERS = 16
"""More than one process can feed and write for; each has about 100 MB of its own."""

OnFraction = Callable[[float, int], None]
"""Told how much of the source is done, 0 to 1, and the records so far."""


@dataclass(frozen=True)
class Job:
    """All that a process must know to turn blocks of a source into chunks."""

    tokenizer: Tokenizer
    settings: Settings
    source: str

    def __call__(self, block: Block, shape: str | None, limit: int | None = None) -> Chunk:
        """`shape`: that of the records before this block, if any. `limit`: usable records to stop behind."""
        converted = convert_rows(block.rows(), shape, self.settings.on_error, limit)
        named = converted.shape or "of no known shape"
        tokenised = tokenise(converted.records, self.tokenizer, self.settings, source=self.source, shape=named)
        if tokenised.refused and self.settings.on_error == "raise":
            converted.problems.clear()  # the refused record comes before it
        return Chunk.of(converted, tokenised)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def read_chunks(
    parts: Sequence[Part], job: Job, *, limit: int | None, num_workers: int, on_fraction: OnFraction
) -> Generator[Chunk, None, None]:
    """Every chunk of a source up to its `limit`-th usable record. The result does not depend on `num_workers`.

    The first usable record fixes the shape of all others, so blocks are worked on here until there is one. Raises
    DataError for the first record, in the source's order, that cannot be used, unless `on_error` is "skip".
    """
    usable, shape = 0, None
    blocks = _placed(parts)
    for block, fraction in blocks:
        chunk = job(block, shape, None if limit is None else limit - usable)
        yield _checked(chunk, job)
        usable, shape = usable + chunk.usable, chunk.shape
        on_fraction(1.0 if usable == limit else fraction, usable)
        if usable == limit:
            return
        if num_workers > 1 and shape is not None and usable >= IN_PROCESS:
            break
    else:
        return
    with Workers(min(num_workers, MAX_WORKERS), job, shape) as workers:
        for (block, fraction), chunk in workers.map(blocks, lambda placed: placed[0]):
            if limit is not None and usable + chunk.usable >= limit:
                yield _checked(job(block, shape, limit - usable), job)  # again, and no further than the limit
                on_fraction(1.0, limit)
                return
            yield _checked(chunk, job)
            usable += chunk.usable
            on_fraction(fraction, usable)


def _checked(chunk: Chunk, job: Job) -> Chunk:
    if chunk.problems and job.settings.on_error == "raise":
        raise chunk.problems[0].error()
    return chunk


def _placed(parts: Sequence[Part]) -> Iterator[tuple[Block, float]]:
    """Blocks, each with the share of the source that is done when it is; files count alike, whatever their size."""
    for index, part in enumerate(parts):
        for block in part.blocks():
            yield block, (index + block.done) / len(parts)
