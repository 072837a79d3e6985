"""NEFTune: transformers' own hook is the oracle for one sequence; the rest is where the noise goes, and its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations.neftune import neftune_post_forward_hook

from tests.models.adapter_kinds import VIRTUAL
from tests.models.small_models import VOCABULARY, as_loaded, small_gpt2, small_llama
from tunelab.models.adapters import adapter_disabled, attach_adapter
from tunelab.models.engine import choose_layout, compute_logprobs, sequence_logprobs
from tunelab.models.generation import GenerationSettings, generate
from tunelab.models.loaded import LoadedModel
from tunelab.models.noise import embedding_noise
from tunelab.models.packed import _probe_batch
from tunelab.types import Batch, Segment

Build = Callable[[], PreTrainedModel]
ALPHA = 15.0
LAYOUTS = [("packed", "auto"), ("packed", "plain"), ("padded", "auto")]


def gpt2() -> PreTrainedModel:
    return small_gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


def noisy(build: Build, layout: str = "packed", kernels: str = "auto", kind: str | None = None) -> LoadedModel:
    loaded = as_loaded(build())
    if kind is not None:
        attach_adapter(loaded, VIRTUAL[kind], seed=0)
    choose_layout(loaded, layout, 24, kernels)  # type: ignore[arg-type]
    loaded.neftune_noise_alpha = ALPHA
    loaded.model.train()
    return loaded


def one_sequence(count: int = 9) -> Batch:
    ids = torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(0))
    at = torch.arange(count)
    return Batch(ids, at, (Segment(0, count),), at[:-1], ids[1:], torch.zeros(count - 1, dtype=torch.long), 1, (0,))


@pytest.mark.parametrize("build", [gpt2, small_llama])
@pytest.mark.parametrize(("layout", "kernels"), LAYOUTS)
def test_the_same_noise_as_transformers_gives_the_same_numbers(build: Build, layout: str, kernels: str) -> None:
    loaded, batch = noisy(build, layout, kernels), one_sequence()
    torch.manual_seed(7)
    found = compute_logprobs(loaded, batch)
    (found * torch.linspace(-1, 2, len(found))).sum().backward()
    stock = build().train()
    embedding = stock.get_input_embeddings()
    embedding.neftune_noise_alpha = ALPHA
    embedding.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(7)
    logits = stock(batch.input_ids[None]).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    (expected * torch.linspace(-1, 2, len(found))).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for (name, ours), theirs in zip(loaded.model.named_parameters(), stock.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


@pytest.mark.parametrize("build", [gpt2, small_llama])
@pytest.mark.parametrize("kind", [None, "prompt_tuning", "prefix_tuning"])
def test_layouts_draw_the_same_noise(build: Build, kind: str | None) -> None:
    """Pairs that share a prompt included: both completions see the prompt with its one noise."""
    found = []
    for layout, kernels in LAYOUTS:
        loaded = noisy(build, layout, kernels, kind)
        torch.manual_seed(7)
        found.append(compute_logprobs(loaded, _probe_batch(loaded.model)))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-5)
    loaded.neftune_noise_alpha = None
    assert (compute_logprobs(loaded, _probe_batch(loaded.model)) - found[0]).abs().max() > 1e-3


def test_its_size_is_alpha_over_the_root_of_length_times_width() -> None:
    """By the length of each token's own sequence: the prompt's 100 + 300 for the longer completion, of two."""
    segments = (Segment(0, 100), Segment(100, 200, 0, 100), Segment(200, 500, 0, 100), Segment(500, 550))
    batch = replace(one_sequence(550), segments=segments)
    torch.manual_seed(0)
    width = 256
    noise = embedding_noise(batch, ALPHA, width)
    assert noise.shape == (550, width)
    assert noise.dtype == torch.float32
    for (start, stop), length in {(0, 100): 400, (100, 200): 200, (200, 500): 400, (500, 550): 50}.items():
        own, limit = noise[start:stop].flatten(), ALPHA / (length * width) ** 0.5
        assert own.abs().max() <= limit
        assert own.abs().max() >= 0.999 * limit
        # Uniform in ±limit: mean 0, variance limit²/3, fourth moment limit⁴/5; within six standard errors.
        count = own.numel()
        assert own.mean().abs() <= 6 * limit / (3 * count) ** 0.5
        assert abs(own.square().mean() - limit**2 / 3) <= 6 * limit**2 * (4 / 45 / count) ** 0.5
    half = len(noise) // 2
    assert torch.corrcoef(torch.stack((noise[:half].flatten(), noise[half:].flatten())))[0, 1].abs() < 0.02


def test_virtual_tokens_have_none() -> None:
    """The noise of a row does not depend on them, and their embeddings reach the blocks as they are."""
    from tunelab.models.virtual_rows import VirtualTokens, prepare_row

    batch, width = _probe_batch(gpt2()), 32
    noise, virtual = torch.ones(batch.num_tokens, width), VirtualTokens(embeddings=torch.full((3, width), 5.0))
    row = prepare_row(batch, virtual, noise)
    assert row.edit is not None
    found = row.edit(torch.zeros(row.batch.num_tokens, width))
    is_virtual = found[:, 0] == 5.0
    assert int(is_virtual.sum()) == 3 * 2  # two roots
    assert torch.all(found[is_virtual] == 5.0)
    assert torch.all(found[~is_virtual] == 1.0)


@pytest.mark.parametrize("build", [gpt2, small_llama])
@pytest.mark.parametrize(("layout", "kernels"), LAYOUTS)
def test_off_in_evaluation_and_in_generation(build: Build, layout: str, kernels: str) -> None:
    loaded, plain = noisy(build, layout, kernels), noisy(build, layout, kernels)
    plain.neftune_noise_alpha = None
    batch, state = _probe_batch(loaded.model), torch.get_rng_state()
    ours, _ = sequence_logprobs(loaded, [batch])
    expected, _ = sequence_logprobs(plain, [batch])
    assert (ours == expected).all()
    settings = GenerationSettings(max_new_tokens=4)
    assert generate(loaded, [[5, 6]], settings) == generate(plain, [[5, 6]], settings)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert loaded.model.training


def test_a_reference_has_none() -> None:
    """The adapter switched off, in evaluation as the reference is scored."""
    loaded = noisy(small_llama, kind="prompt_tuning")
    plain = as_loaded(small_llama())
    choose_layout(plain, "packed", 24)
    batch = _probe_batch(plain.model)
    with adapter_disabled(loaded):
        found, _ = sequence_logprobs(loaded, [batch])
    expected, _ = sequence_logprobs(plain, [batch])
    assert (found == expected).all()


def test_drawn_from_the_global_generator() -> None:
    """Which checkpoints hold: the state decides, and moves on."""
    loaded = noisy(gpt2)
    batch = _probe_batch(loaded.model)
    with torch.no_grad():
        torch.manual_seed(3)
        first, second = compute_logprobs(loaded, batch), compute_logprobs(loaded, batch)
        torch.manual_seed(3)
        assert torch.equal(compute_logprobs(loaded, batch), first)
        assert torch.equal(compute_logprobs(loaded, batch), second)
    assert not torch.equal(first, second)


def test_the_hook_is_transformers_own() -> None:
    """The oracle above: α/√(L·d) of its output, while training."""
    module = SimpleNamespace(training=True, neftune_noise_alpha=2.0)
    torch.manual_seed(0)
    found = neftune_post_forward_hook(module, None, torch.zeros(1, 50, 200))
    assert 0.99 * 2 / 100 < found.abs().max() <= 2 / 100
