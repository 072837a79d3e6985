"""The order of training is a pure function."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunelab.data import Loader, fixed_sample

loaders = st.builds(
    Loader,
    num_records=st.integers(1, 40),
    records_per_step=st.integers(1, 17),
    num_epochs=st.sampled_from([0.1, 0.5, 1.0, 1.1, 2.0, 2.75]),
    max_steps=st.none() | st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    shuffle=st.booleans(),
)


def stream(loader: Loader) -> list[int]:
    return [int(index) for step in range(loader.num_steps) for index in loader.indices(step)]


@settings(max_examples=200, deadline=None)
@given(loaders)
def test_epochs_are_permutations(loader: Loader) -> None:
    found = stream(loader)
    everyone = list(range(loader.num_records))
    for start in range(0, len(found), loader.num_records):
        epoch = found[start : start + loader.num_records]
        if len(epoch) == loader.num_records:
            assert sorted(epoch) == everyone
        else:
            assert len(set(epoch)) == len(epoch), "a started epoch repeats nothing"
        if not loader.shuffle:
            assert epoch == everyone[: len(epoch)]


@settings(max_examples=200, deadline=None)
@given(loaders)
def test_lengths(loader: Loader) -> None:
    if loader.max_steps is None:
        expected = max(1, round(loader.num_epochs * loader.num_records))
    else:
        expected = loader.max_steps * loader.records_per_step
        assert loader.num_steps == loader.max_steps
    sizes = [len(loader.indices(step)) for step in range(loader.num_steps)]
    assert sum(sizes) == expected
    assert set(sizes[:-1]) <= {loader.records_per_step}
    assert 1 <= sizes[-1] <= loader.records_per_step
    assert loader.num_steps == math.ceil(expected / loader.records_per_step)
    for step in (-1, loader.num_steps):
        with pytest.raises(IndexError):
            loader.indices(step)


@settings(max_examples=200, deadline=None)
@given(loaders, st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_what_one_rank_would_train_on(loader: Loader, per_device: int, world: int) -> None:
    step = loader.num_steps - 1
    batches = [loader.micro_batches(step, per_device, rank, world) for rank in range(world)]
    assert len({len(own) for own in batches}) == 1, "ranks meet in every micro-batch"
    assert all(len(batch) <= per_device for own in batches for batch in own)
    together = np.concatenate([batch for own in batches for batch in own])
    assert sorted(together.tolist()) == sorted(loader.indices(step).tolist())
    if world == 1:
        assert np.concatenate(batches[0]).tolist() == loader.indices(step).tolist()
        assert all(len(batch) for batch in batches[0])


@settings(max_examples=100, deadline=None)
@given(loaders, st.randoms())
def test_steps_do_not_depend_on_what_was_asked_before(loader: Loader, random: object) -> None:
    in_order = [loader.indices(step).tolist() for step in range(loader.num_steps)]
    steps = list(range(loader.num_steps))
    random.shuffle(steps)  # type: ignore[attr-defined]
    for step in steps:
        assert loader.indices(step).tolist() == in_order[step]


def test_the_order_does_not_depend_on_the_size_of_steps() -> None:
    assert stream(Loader(23, 4, num_epochs=2)) == stream(Loader(23, 7, num_epochs=2))


def test_seeds_and_epochs_differ() -> None:
    first, second = (stream(Loader(100, 10, num_epochs=2, seed=seed)) for seed in (0, 1))
    assert first[:100] != second[:100]
    assert first[:100] != first[100:]


def test_shuffling_is_uniform() -> None:
    """Each of the 6 orders of 3 records, 600 seeds: expected 100, variance 600·(1/6)(5/6) ≈ 83; 5 sigma is 46."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(600):
        order = tuple(stream(Loader(3, 3, seed=seed)))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 100) < 46 for count in counts.values())


def philox_words(key: tuple[int, int], count: int) -> list[int]:
    """Philox 4x64-10 from the paper (Salmon et al. 2011, section 3.4 and table 2), in Python integers.

    numpy's stream is blocks of four words at counters 1, 2, 3, …
    """
    mask = 2**64 - 1
    words: list[int] = []
    for counter in range(1, -(-count // 4) + 1):
        c, k = [counter, 0, 0, 0], list(key)
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * c[2], 2**64)
            c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += c
    return words[:count]


@pytest.mark.parametrize(("seed", "epoch"), [(7, 0), (7, 1), (2**32 - 1, 3)])
def test_the_order_is_philox_sorted(seed: int, epoch: int) -> None:
    """Any numpy and any machine must give this, or a resumed run would train on other records."""
    words = philox_words((seed, epoch), 10)
    found = stream(Loader(10, 3, num_epochs=epoch + 1, seed=seed))[10 * epoch :]
    assert found == sorted(range(10), key=words.__getitem__)


def test_another_process_agrees() -> None:
    code = "from tunelab.data.loader import Loader; print(Loader(50, 50, seed=5).indices(0).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(Loader(50, 50, seed=5).indices(0).tolist())


@given(st.integers(1, 60), st.integers(0, 70), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_fixed_samples(num_records: int, count: int, more: int, seed: int) -> None:
    sample = fixed_sample(num_records, count, seed).tolist()
    assert len(sample) == len(set(sample)) == min(count, num_records)
    assert sample == sorted(sample)
    assert set(sample) <= set(range(num_records))
    assert set(sample) <= set(fixed_sample(num_records, count + more, seed).tolist())


def test_a_sample_is_not_the_first_epoch() -> None:
    assert fixed_sample(1000, 10, 0).tolist() != sorted(Loader(1000, 10, seed=0).indices(0).tolist())
