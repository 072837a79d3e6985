"""What one row of a batch asks of memory, in counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tunelab.types import Batch


@dataclass(frozen=True)
class Row:
    """A packed row of `tokens` T with `loss_positions` S.

    kept: Q, the positions that the last block computes (`Batch.tail`). sequences: how many completions, `longest` of
    them with its prompt: the padded layout has sequences × longest positions.
    """

    tokens: int
    kept: int
    loss_positions: int
    sequences: int
    longest: int

    @classmethod
    def of(cls, batch: Batch) -> Row:
        prompts = {(s.prefix_start, s.prefix_stop) for s in batch.segments if s.prefix_length}
        lengths = [s.stop - s.start + s.prefix_length for s in batch.segments if (s.start, s.stop) not in prompts]
        return cls(batch.num_tokens, len(batch.tail.kept), len(batch.targets), batch.num_sequences, max(lengths))

    @property
    def padded(self) -> int:
        """Positions of the padded layout."""
        return self.sequences * self.longest

    def unpruned(self, padded: bool = False) -> Row:
        """The row as blocks see it that compute every position, padded or not."""
        tokens = self.padded if padded else self.tokens
        return replace(self, tokens=tokens, kept=tokens)
