"""The bootstrap against hand counts, a naive loop, and known truths."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunelab.evaluation import statistics
from tunelab.evaluation.statistics import Interval, bootstrap_mean, bootstrap_paired, resample_indices


def naive_interval(values, weights, resamples, seed, confidence):
    """The definition in plain Python on the same index draws, with its own linear-interpolation quantile."""
    ratios = []
    for chunk in resample_indices(len(values), resamples=resamples, seed=seed):
        for row in chunk.tolist():
            ratios.append(math.fsum(values[i] for i in row) / math.fsum(weights[i] for i in row))
    ratios.sort()

    def quantile(q):
        position = q * (len(ratios) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ratios) - 1)
        return ratios[below] + (position - below) * (ratios[above] - ratios[below])

    tail = (1 - confidence) / 2
    return math.fsum(values) / math.fsum(weights), quantile(tail), quantile(1 - tail)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_equals_a_naive_loop_on_the_same_draws(confidence):
    rng = np.random.default_rng(3)
    weights = rng.integers(1, 90, size=37).astype(float)
    values = weights * rng.normal(2.4, 0.5, size=37)
    got = bootstrap_mean(values, weights, resamples=301, seed=11, confidence=confidence)
    value, low, high = naive_interval(values.tolist(), weights.tolist(), 301, 11, confidence)
    assert (got.value, got.low, got.high) == pytest.approx((value, low, high), rel=1e-12)
    assert got.n == 37


def test_two_records_by_hand():
    """Records with NLL 2 over 1 token and NLL 9 over 3 tokens: ratios 2 and 3.

    The estimate is (2 + 9) / (1 + 3) = 11/4. A resample is (first, first) = 4/2 = 2 with probability 1/4,
    (second, second) = 18/6 = 3 with 1/4, or mixed = 11/4 with 1/2. The 2.5% and 97.5% quantiles are therefore 2 and 3,
    while the 30% and 70% quantiles (confidence 0.4) are both 11/4.
    """
    wide = bootstrap_mean([2.0, 9.0], [1.0, 3.0], resamples=4000)
    assert (wide.value, wide.low, wide.high, wide.n) == (2.75, 2.0, 3.0, 2)
    middle = bootstrap_mean([2.0, 9.0], [1.0, 3.0], resamples=4000, confidence=0.4)
    assert (middle.low, middle.high) == (2.75, 2.75)


def test_a_long_record_counts_by_its_tokens():
    """(10 + 300) / (10 + 100) = 31/11, not the mean 2 of the two records' own averages 1 and 3."""
    assert bootstrap_mean([10.0, 300.0], [10, 100]).value == pytest.approx(31 / 11, rel=1e-15)
    assert bootstrap_mean([1.0, 3.0]).value == 2.0


def test_deterministic_and_independent_of_chunking(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_mean(values, seed=5, resamples=400)
    monkeypatch.setattr(statistics, "_CHUNK_INDICES", 50 * 7 + 3)
    assert bootstrap_mean(values, seed=5, resamples=400) == whole
    assert bootstrap_mean(values, seed=6, resamples=400) != whole


def test_coverage_of_a_known_ratio():
    """Clusters with lognormal sizes; per-token loss of a cluster is 2 + noise independent of its size: the truth is 2.

    Of 300 nominal 95% intervals about 285 should hold it (binomial sd 3.8; the percentile bootstrap at N = 80 covers
    slightly less). An interval over tokens that ignored the clusters would cover only about a quarter.
    """
    rng = np.random.default_rng(2024)
    hits = 0
    for trial in range(300):
        sizes = np.ceil(rng.lognormal(3.0, 0.6, size=80))
        got = bootstrap_mean(sizes * rng.normal(2.0, 0.7, size=80), sizes, resamples=400, seed=trial)
        hits += got.low <= 2.0 <= got.high
    assert 270 <= hits <= 296


def test_coverage_of_a_paired_difference():
    """Truth -0.1; the records' own difficulty (sd 1) is shared by both models and must not widen the interval."""
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(200):
        difficulty = rng.normal(3.0, 1.0, size=60)
        before = difficulty + rng.normal(0, 0.1, size=60)
        after = difficulty - 0.1 + rng.normal(0, 0.1, size=60)
        got = bootstrap_paired(after, before, resamples=400, seed=trial)
        hits += got.low <= -0.1 <= got.high
        assert got.high - got.low < 0.15
    assert 178 <= hits <= 199


def test_paired_is_narrower_than_unpaired_and_signed():
    rng = np.random.default_rng(1)
    weights = rng.integers(10, 90, size=100)
    before = weights * rng.normal(2.4, 0.5, size=100)
    after = before - 0.28 * weights + rng.normal(0, 1.0, size=100)
    paired = bootstrap_paired(after, before, weights)
    first, second = bootstrap_mean(before, weights, seed=1), bootstrap_mean(after, weights, seed=2)
    assert paired.value == pytest.approx(second.value - first.value, abs=1e-12)
    assert paired.high < 0 < first.high - second.low  # shown by the paired interval, hidden by two separate ones
    assert paired.high - paired.low < 0.3 * (first.high - first.low)


def test_perplexity_interval_is_exp_of_the_loss_interval():
    losses = np.random.default_rng(4).normal(2.0, 0.2, size=30)
    loss = bootstrap_mean(losses)
    perplexity = loss.map(np.exp)
    assert perplexity == Interval(math.exp(loss.value), math.exp(loss.low), math.exp(loss.high), 30)
    flipped = loss.map(lambda x: -x)
    assert flipped.low < flipped.value < flipped.high
    assert all(type(v) in (float, int) for v in perplexity.to_json().values())


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([], None, "at least one record"),
        ([[1.0, 2.0]], None, "one value per record"),
        ([1.0, math.nan], None, "record 1 is nan"),
        ([math.inf, 1.0], None, "record 0 is inf"),
        ([1.0, 2.0], [1.0, math.nan], "weights must be finite"),
        ([1.0, 2.0], [1.0, 0.0], "weights must be positive; record 1"),
        ([1.0, 2.0], [-1.0, 3.0], "record 0"),
        ([1.0, 2.0], [1.0], "one weight per record"),
    ],
)
def test_refuses_what_has_no_interval(values, weights, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, weights)


def test_refuses_unpaired_records_and_bad_settings():
    with pytest.raises(ValueError, match="same records"):
        bootstrap_paired([1.0], [1.0, 2.0])
    for settings in ({"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="need resamples"):
            bootstrap_mean([1.0, 2.0], **settings)
