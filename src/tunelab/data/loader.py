"""Which records each optimizer step trains on: a pure function of (seed, step), so there is no state to save.

A resumed run asks for the next step and gets what the unbroken run would have got; N ranks share out what one rank
would have trained on. The stream of records is epoch after epoch, each in its own order; step s takes the next
`records_per_step` of it.

The order of an epoch sorts the words of Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), a
counter-based generator, under the key (seed, epoch). numpy promises the words of a bit generator for all versions, but
not the result of `Generator.permutation` (NEP 19): hence the sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_SAMPLE_STREAM = 2**64 - 1
"""Second word of the key of `fixed_sample`: no epoch has this number."""


@lru_cache(maxsize=4)
def _random_order(count: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of 0..count-1, (count,) int64, fixed by the arguments. Read-only, because it is shared."""
    words = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def random_order(num_records: int, seed: int) -> np.ndarray:
    """Every record index once, in an order that no epoch of training has: (num_records,) int64."""
    return _random_order(num_records, seed, _SAMPLE_STREAM)


def fixed_sample(num_records: int, count: int, seed: int) -> np.ndarray:
    """`count` different record indices, or all if there are fewer, ascending. A larger count contains a smaller one."""
    return np.sort(random_order(num_records, seed)[:count])


@dataclass(frozen=True)
class Loader:
    """The order of training.

    num_records: records in the data set. records_per_step: records of one optimizer step, over all micro-batches and
    ranks. num_epochs: may be fractional, then rounded to whole records (at least one). max_steps: overrides num_epochs.
    shuffle: False gives every epoch in the data's own order.
    """

    num_records: int
    records_per_step: int
    num_epochs: float = 1.0
    max_steps: int | None = None
    seed: int = 0
    shuffle: bool = True

    @property
    def num_samples(self) -> int:
        """Records of the whole run; a record counts once an epoch."""
        if self.max_steps is not None:
            return self.max_steps * self.records_per_step
        return max(1, round(self.num_epochs * self.num_records))

    @property
    def num_steps(self) -> int:
        """Optimizer steps. The last takes what is left, and may be smaller than the others."""
        return -(-self.num_samples // self.records_per_step)

    def indices(self, step: int) -> np.ndarray:
        """Records of optimizer step `step` (from 0), in order: (≤ records_per_step,) int64."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        start = step * self.records_per_step
        stop = min(start + self.records_per_step, self.num_samples)
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_records)
            taken = min(stop - start, self.num_records - offset)
            parts.append(self._epoch(epoch)[offset : offset + taken])
            start += taken
        return np.concatenate(parts)

    def micro_batches(self, step: int, per_device: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
        """The step's records that `rank` of `world` trains on, at most `per_device` at a time.

        Over all ranks they are `indices(step)`, whatever the number of ranks. Every rank gets equally many
        micro-batches, because ranks meet in each; in a short last step the last one may therefore be empty on some
        ranks (never on a single one).
        """
        records = self.indices(step)
        count = -(-len(records) // (per_device * world))
        own = records[rank::world]
        return [own[number * per_device : (number + 1) * per_device] for number in range(count)]

    def _epoch(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_records)
        return _random_order(self.num_records, self.seed, epoch)
