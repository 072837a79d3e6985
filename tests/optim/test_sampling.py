"""LISA and BAdam: which layers train, what the others cost, and BAdam against its authors' algorithm."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from tests.optim.lean import one_step, small_batch, small_loaded, small_state, weights
from tunelab.config.optimizers import BAdamConfig, LISAConfig
from tunelab.errors import ConfigError
from tunelab.models.adapters.partial import find_blocks
from tunelab.models.engine import compute_logprobs
from tunelab.models.loaded import LoadedModel
from tunelab.optim.sampling import BAdamSampler, LISASampler, build_sampler
from tunelab.training.state import TrainState


def blocks(count: int) -> list[list[nn.Parameter]]:
    return [[nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))] for _ in range(count)]


def sampled_state(config: LISAConfig | BAdamConfig, **updates: object) -> TrainState:
    loaded = small_loaded()
    _, layers = find_blocks(loaded.model)
    sampler = build_sampler(config, loaded.model, layers, num_steps=100, seed=0)
    return small_state(loaded, config, sampler=sampler, **updates)


def moved(loaded: LoadedModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, after in weights(loaded).items() if not torch.equal(after, before[name])}


# --- which layers -----------------------------------------------------------------------------------------------------


def test_lisa_draws_its_layers_uniformly_and_anew_every_period() -> None:
    sampler = LISASampler(blocks(6), count=2, interval=3, seed=1)
    drawn = [sampler.active(step) for step in range(3 * 2000)]
    assert all(len(active) == 2 for active in drawn)
    for period in range(2000):
        assert len(set(drawn[3 * period : 3 * period + 3])) == 1
    counts = Counter(layer for active in drawn[::3] for layer in active)
    # Binomial(2000, 1/3): five standard deviations are 105.
    assert all(abs(counts[layer] - 2000 / 3) < 105 for layer in range(6))
    other = LISASampler(blocks(6), count=2, interval=3, seed=2)
    assert [other.active(step) for step in range(60)] != drawn[:60]


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_badam_visits_every_block_once_a_round(order: str) -> None:
    sampler = BAdamSampler(blocks(5), switch_every=2, order=order, seed=0)
    turns = [next(iter(sampler.active(step))) for step in range(0, 40, 2)]
    assert [next(iter(sampler.active(step))) for step in range(1, 40, 2)] == turns
    rounds = [turns[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(one) == list(range(5)) for one in rounds)
    if order == "random":
        assert len({tuple(one) for one in rounds}) > 1, "each round has its own order"
    else:
        assert rounds[0] == sorted(range(5), reverse=order == "descending")


def test_badam_switches_so_often_that_all_blocks_have_a_turn() -> None:
    loaded = small_loaded()
    _, layers = find_blocks(loaded.model)
    for num_steps, expected in ((1, 1), (9, 4), (100, 50), (1000, 100)):
        sampler = build_sampler(BAdamConfig(), loaded.model, layers, num_steps=num_steps, seed=0)
        assert isinstance(sampler, BAdamSampler)
        assert sampler.switch_every == expected


# --- what trains, and what the rest costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("releases", [False, True])
def test_only_the_layers_drawn_and_what_lies_outside_move_in_lisa(releases: bool) -> None:
    config = LISAConfig(lisa_activated_layers=1, lisa_interval_steps=1, weight_decay=0.1)
    state = sampled_state(config, releases=releases)
    sampler = state.updates.sampler
    assert sampler is not None
    seen = set()
    for step in range(6):
        before = weights(state.loaded)
        one_step(state)
        (active,) = sampler.active(step)
        seen.add(active)
        inside = {name for name in before if name.startswith(f"transformer.h.{active}.")}
        outside = {name for name in before if ".h." not in name}
        assert moved(state.loaded, before) == inside | outside
        with_state = {name for name, p in state.loaded.named_parameters() if p in state.optimizer.state}
        assert with_state == inside | outside, "frozen layers keep no state"
        assert all(parameter.grad is None for parameter in state.loaded.model.parameters())
    assert seen == {0, 1}


@pytest.mark.parametrize(
    ("include", "outside"),
    [
        ({}, set()),
        ({"include_embedding": True}, {"transformer.wte.weight", "transformer.wpe.weight"}),
        ({"include_lm_head": True}, {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
    ],
    ids=["layers", "embedding", "head"],
)
def test_one_block_at_a_time_moves_in_badam(include: dict[str, bool], outside: set[str]) -> None:
    state = sampled_state(BAdamConfig(switch_every=1, switch_mode="ascending", **include))
    turns = []
    for _ in range(3):
        before = weights(state.loaded)
        one_step(state)
        turns.append(moved(state.loaded, before))
        assert {name for name, p in state.loaded.named_parameters() if p in state.optimizer.state} == turns[-1]
    layers = [{name for name in before if name.startswith(f"transformer.h.{i}.")} for i in (0, 1)]
    below, above = [outside] * ("include_embedding" in include), [outside] * ("include_lm_head" in include)
    expected = below + layers + above
    assert turns == (expected * 2)[:3]


def test_the_backward_pass_ends_at_the_lowest_layer_that_trains() -> None:
    """With the last layer alone, nothing below it is part of the graph."""
    state = sampled_state(BAdamConfig(switch_every=1, switch_mode="descending"))
    state.updates.begin(0, 1e-3)
    asked = [name for name, p in state.loaded.named_parameters() if p.requires_grad]
    assert asked
    assert all(name.startswith("transformer.h.1.") for name in asked)
    total = compute_logprobs(state.loaded, small_batch().batch).sum()
    functions, seen = [total.grad_fn], set()
    while functions:
        function = functions.pop()
        if function is not None and function not in seen:
            seen.add(function)
            functions += [below for below, _ in function.next_functions]
    names = Counter(type(function).__name__ for function in seen)
    assert names["_BlockInputBackward"] == names["_BlockOutputBackward"] == 1
    assert not any("Embedding" in name for name in names)


# --- BAdam's numbers --------------------------------------------------------------------------------------------------


def test_badam_is_adam_that_starts_anew_with_every_block() -> None:
    """Luo et al. 2024, algorithm 1, in float64: m, v ← 0 at a switch, bias corrections by the step within the block."""
    config = BAdamConfig(switch_every=3, switch_mode="ascending", betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    state = sampled_state(config)
    sampler = state.updates.sampler
    assert sampler is not None
    names = {id(parameter): name for name, parameter in state.loaded.named_parameters()}
    gradients: dict[str, Tensor] = {}
    for name, parameter in state.loaded.named_parameters():
        if parameter.requires_grad:  # hooks cannot wait for a parameter to be thawed
            parameter.register_hook(lambda grad, name=name: gradients.__setitem__(name, grad.double()))
    rate, (beta1, beta2), eps = 1e-3, config.betas, config.eps
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    for step in range(9):
        expected = {name: value.double() for name, value in weights(state.loaded).items()}
        gradients.clear()
        one_step(state, rate)
        within = step % 3 + 1
        if within == 1:
            mean, square = {}, {}
        (active,) = sampler.active(step)
        assert active == step // 3 % 2
        assert set(gradients) == {names[id(parameter)] for parameter in sampler.blocks[active]}
        for name, gradient in gradients.items():
            mean[name] = beta1 * mean.get(name, 0.0) + (1 - beta1) * gradient
            square[name] = beta2 * square.get(name, 0.0) + (1 - beta2) * gradient**2
            corrected = (square[name] / (1 - beta2**within)).sqrt() + eps
            expected[name] -= rate * mean[name] / (1 - beta1**within) / corrected
        for name, after in weights(state.loaded).items():
            torch.testing.assert_close(after.double(), expected[name], rtol=1e-5, atol=2e-7)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lisa_activated_layers: 3 is more than the 2 layers"):
        sampled_state(LISAConfig(lisa_activated_layers=3))


def test_nothing_to_take_turns_with_is_refused() -> None:
    loaded = small_loaded()
    loaded.model.requires_grad_(False)
    _, layers = find_blocks(loaded.model)
    with pytest.raises(ConfigError, match="badam trains layers in turn, and none of them is trainable"):
        build_sampler(BAdamConfig(include_embedding=True), loaded.model, layers, num_steps=10, seed=0)
