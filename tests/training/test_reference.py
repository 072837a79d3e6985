"""Reference log-probabilities: right, computed once, and never those of something else."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.training.conftest import build_tiny
from tunelab.data import Dataset
from tunelab.models.engine import choose_layout
from tunelab.models.loaded import LoadedModel
from tunelab.progress import SilentProgress
from tunelab.training import reference
from tunelab.training.loop import StopRequested
from tunelab.training.reference import reference_logprobs
from tunelab.training.signals import StopSignal
from tunelab.types import Completion, Example, Origin

NUM_PAIRS = 21
"""Three batches of the module's eight, the last not full."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pairs(fingerprint: str = "pairs") -> Dataset:
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(0, 1000, rng.integers(low, high)).astype(np.int32)

    def completion() -> Completion:
        own = ids(1, 30)
        return Completion(own, np.ones(len(own), dtype=bool))

    examples = tuple(
        Example(ids(1, 20), (completion(), completion()), Origin("test", line)) for line in range(1, NUM_PAIRS + 1)
    )
    return Dataset(examples, None, fingerprint)  # type: ignore[arg-type]


def plain(loaded: LoadedModel, dataset: Dataset) -> np.ndarray:
    """(P, 2) by transformers' eager model, one sequence at a time: log-softmax, gather, sum over the completion."""
    config = type(loaded.model.config)(**loaded.model.config.to_dict())
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(loaded.model.state_dict())
    rows = []
    with torch.no_grad():
        for example in dataset.examples:
            row = []
            for completion in example.completions:
                ids = torch.tensor([*example.prompt_ids, *completion.ids], dtype=torch.long)
                logprobs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
                start = len(example.prompt_ids)
                row.append(sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))))
            rows.append(row)
    return np.array(rows)


def compute(
    loaded: LoadedModel, dataset: Dataset | None = None, indices: object = None, stop: StopSignal | None = None
) -> np.ndarray:
    dataset = dataset or pairs()
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    (values,) = reference_logprobs(loaded, [(dataset, chosen)], SilentProgress(), stop or StopSignal())
    return values


def explode(*arguments: object) -> None:
    raise AssertionError("the model was asked, although the answer is in the cache")


def files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_values_are_the_plain_models(tiny: LoadedModel) -> None:
    values = compute(tiny)
    assert values.shape == (NUM_PAIRS, 2)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, plain(tiny, pairs()), rtol=1e-5, atol=1e-4)


def test_rows_not_asked_for_are_nan(tiny: LoadedModel) -> None:
    chosen = [3, 11, 4, 20]
    values = compute(tiny, indices=chosen)
    np.testing.assert_allclose(values[chosen], plain(tiny, pairs())[chosen], rtol=1e-5, atol=1e-4)
    others = sorted(set(range(NUM_PAIRS)) - set(chosen))
    assert np.isnan(values[others]).all()


def test_the_second_call_reads_the_cache(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [3, 11, 4, 20]
    first = compute(tiny, indices=chosen)
    monkeypatch.setattr(reference, "sequence_logprobs", explode)
    np.testing.assert_array_equal(compute(tiny, indices=chosen), first)
    np.testing.assert_array_equal(compute(build_tiny(), indices=chosen), first)


def test_several_data_sets_in_one_call(tiny: LoadedModel) -> None:
    other = replace(pairs("eval"), examples=pairs().examples[5:9])
    wanted = [(pairs("train"), np.array([0, 2])), (other, np.arange(4))]
    train, held_out = reference_logprobs(tiny, wanted, SilentProgress(), StopSignal())
    expected = plain(tiny, pairs())
    np.testing.assert_allclose(train[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(held_out, expected[5:9], rtol=1e-5, atol=1e-4)


def test_other_weights_are_another_reference(tiny: LoadedModel, cache: Path) -> None:
    first = compute(tiny)
    with torch.no_grad():  # the least change there is: one bit of one number
        bias = tiny.model.transformer.h[1].mlp.c_proj.bias
        bias[0] = torch.nextafter(bias[0], torch.tensor(1.0))
    compute(tiny)
    assert len(files(cache)) == 2
    values = compute(build_tiny(seed=1))
    assert len(files(cache)) == 3
    assert not np.allclose(values, first, atol=1e-3)
    np.testing.assert_allclose(values, plain(build_tiny(seed=1), pairs()), rtol=1e-5, atol=1e-4)


def test_other_data_or_records_are_another_reference(tiny: LoadedModel, cache: Path) -> None:
    compute(tiny, indices=[0, 1])
    compute(tiny, pairs("other tokens"), [0, 1])
    assert len(files(cache)) == 2
    swapped = compute(tiny, indices=[1, 0])
    compute(tiny, indices=[0, 1, 2])
    assert len(files(cache)) == 4
    np.testing.assert_array_equal(swapped, compute(tiny, indices=[0, 1]))
    assert len(files(cache)) == 4


@pytest.mark.parametrize("damage", ["cut short", "emptied", "not safetensors"])
def test_a_damaged_file_is_computed_again(
    tiny: LoadedModel, cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compute(tiny)
    (path,) = files(cache)
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[:-5], "emptied": b"", "not safetensors": b"\xff" * len(whole)}[damage])
    np.testing.assert_array_equal(compute(tiny), first)
    assert path.read_bytes() == whole, "and written again"
    monkeypatch.setattr(reference, "sequence_logprobs", explode)
    np.testing.assert_array_equal(compute(tiny), first)


def test_a_stop_midway_leaves_nothing(tiny: LoadedModel, cache: Path) -> None:
    stop = StopSignal()

    class StopAfterTheFirstBatch(SilentProgress):
        advanced = 0

        def advance(self, task: str, amount: int = 1, **numbers: float) -> None:
            self.advanced += amount
            stop.received = signal.SIGTERM

    tiny.model.train()
    progress = StopAfterTheFirstBatch()
    with pytest.raises(StopRequested):
        reference_logprobs(tiny, [(pairs(), np.arange(NUM_PAIRS))], progress, stop)
    assert 0 < progress.advanced < NUM_PAIRS, "it stopped midway"
    assert not files(cache)
    assert tiny.model.training, "the mode is restored"
    np.testing.assert_allclose(compute(tiny), plain(tiny, pairs()), rtol=1e-5, atol=1e-4)


def test_dropout_does_not_touch_the_reference(tiny: LoadedModel) -> None:
    expected = plain(tiny, pairs())
    for module in tiny.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    choose_layout(tiny, "packed", 128)
    tiny.model.train()
    np.testing.assert_allclose(compute(tiny), expected, rtol=1e-5, atol=1e-4)
