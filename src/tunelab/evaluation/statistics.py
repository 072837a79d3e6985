"""Intervals by the percentile bootstrap over records (Efron & Tibshirani 1993, ch. 13). numpy only.

A held-out loss is a ratio: negative log-likelihood summed over tokens, divided by the number of tokens. Tokens of one
record are not independent, so whole records are resampled (clusters) and the ratio is recomputed on each resample.
Shape letters: N records, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CHUNK_INDICES = 2_000_000
"""Indices drawn at once: bounds the working memory to about 50 MB whatever N and R are."""


@dataclass(frozen=True)
class Interval:
    """A point estimate, the ends of its interval, and the number of records behind it.

    With one record the ends equal the value, and with fewer than about ten the interval is too narrow to rely on.
    """

    value: float
    low: float
    high: float
    n: int

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of `function(estimate)`; `function` must be monotone: `np.exp` makes loss into perplexity.

        Percentile intervals respect such transforms: quantiles of exp(x) are exp of the quantiles (up to the
        interpolation between two neighbouring resamples).
        """
        low, high = sorted((float(function(self.low)), float(function(self.high))))
        return Interval(float(function(self.value)), low, high, self.n)

    def to_json(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def bootstrap_mean(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Interval of sum(values) / sum(weights) over records; of the plain mean where `weights` is None.

    values, weights: (N,). For a loss per token, `values` are negative log-likelihoods summed over each record and
    `weights` its token counts. The same arguments always give the same interval. Raises ValueError for empty,
    non-finite or mismatched input, and for weights that are not positive.
    """
    sums, sizes = _checked(values, weights)
    if resamples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(f"need resamples >= 1 and 0 < confidence < 1, got {resamples} and {confidence}")
    ratios = np.concatenate(
        [
            sums[chunk].sum(axis=1) / sizes[chunk].sum(axis=1)
            for chunk in resample_indices(len(sums), resamples=resamples, seed=seed)
        ]
    )
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(ratios, [tail, 1.0 - tail])
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high), len(sums))


def bootstrap_paired(
    a: ArrayLike,
    b: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Interval of a minus b, (sum(a) - sum(b)) / sum(weights), measured on the same records.

    a, b, weights: (N,), aligned by record. Each resample draws the same records for both, so what makes a record
    hard for both models cancels. Negative means that `a` is the smaller: give (after, before) for the change from
    before to after. Raises ValueError as `bootstrap_mean` does.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a and b must describe the same records, got shapes {first.shape} and {second.shape}")
    return bootstrap_mean(first - second, weights, resamples=resamples, seed=seed, confidence=confidence)


def resample_indices(num_records: int, *, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Chunks (r, N) of record indices drawn with replacement, R rows in all.

    The stream depends on `num_records`, `resamples` and `seed` alone, not on how it is cut into chunks.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_INDICES // num_records)
    for start in range(0, resamples, rows):
        yield rng.integers(0, num_records, size=(min(rows, resamples - start), num_records))


def _checked(values: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats]:
    sums = np.asarray(values, dtype=np.float64)
    sizes = np.ones_like(sums) if weights is None else np.asarray(weights, dtype=np.float64)
    if sums.ndim != 1 or sums.size == 0:
        raise ValueError(f"need one value per record and at least one record, got shape {sums.shape}")
    if sizes.shape != sums.shape:
        raise ValueError(f"need one weight per record, got {sizes.shape} for {sums.shape} values")
    for name, array in (("values", sums), ("weights", sizes)):
        bad = np.flatnonzero(~np.isfinite(array))
        if bad.size:
            raise ValueError(f"{name} must be finite; record {bad[0]} is {array[bad[0]]} ({bad.size} such)")
    if (sizes <= 0).any():
        raise ValueError(f"weights must be positive; record {np.flatnonzero(sizes <= 0)[0]} is not")
    return sums, sizes
