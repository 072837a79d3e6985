"""Gradient release: the same steps as without, with the gradients of one function alive at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models import small_models
from tests.optim.lean import MODELS, check_equal, one_step, small_batch, small_loaded, small_state, weights
from tunelab.config import AdamWConfig, SFTConfig, SGDConfig
from tunelab.config.optimizers import OPTIMIZER_KINDS
from tunelab.errors import DivergedError
from tunelab.models.checkpointing import enable_checkpointing
from tunelab.models.engine import choose_layout
from tunelab.models.loaded import LoadedModel
from tunelab.objectives import build_objective
from tunelab.optim.single import SingleSteps
from tunelab.training.step import MicroBatch, train_step

STEPS = 3


def run(loaded: LoadedModel, config: Any, releases: bool) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    state = small_state(loaded, config, releases=releases)
    metrics = [one_step(state, config.learning_rate) for _ in range(STEPS)]
    assert all(parameter.grad is None for _, parameter in loaded.named_parameters())
    return weights(loaded), metrics


def check_same_metrics(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """The norm adds the same squares up in another order."""
    for one, two in zip(found, expected, strict=True):
        assert one.pop("grad_norm") == pytest.approx(two.pop("grad_norm"), rel=1e-6)
        assert one == two


@pytest.mark.parametrize("kind", OPTIMIZER_KINDS, ids=lambda kind: kind.model_fields["name"].default)
def test_every_optimizer_takes_the_same_steps_with_and_without(kind: type) -> None:
    config = kind(weight_decay=0.1)
    start = weights(small_loaded())
    plain, expected = run(small_loaded(), config, releases=False)
    released, found = run(small_loaded(), config, releases=True)
    check_equal(plain, released)
    check_same_metrics(found, expected)
    assert any(not torch.equal(start[name], plain[name]) for name in start), "the control: the steps must move"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["fused", "own modules", "padded", "checkpointing"])
def test_every_way_through_the_model(name: str, layout: str) -> None:
    """Tied and untied heads; block functions that hand back many gradients at once, and autograd's own."""
    settings: dict[str, Any] = {"own modules": {"kernels": "plain"}, "padded": {"layout": "padded"}}.get(layout, {})

    def built() -> LoadedModel:
        loaded = small_loaded(name, **settings)
        assert loaded.shortcuts.fused_blocks == (layout in ("fused", "checkpointing"))
        if layout == "checkpointing":
            enable_checkpointing(loaded.model)
        return loaded

    config = AdamWConfig(weight_decay=0.1)
    plain, expected = run(built(), config, releases=False)
    released, found = run(built(), config, releases=True)
    check_equal(plain, released)
    check_same_metrics(found, expected)


def test_every_parameter_is_updated_once_a_step() -> None:
    """A tied weight has two uses and one gradient."""
    loaded = small_loaded("gpt2")
    state = small_state(loaded, SGDConfig(), releases=True)
    seen: list[int] = []
    update = state.updates._update_one
    state.updates._update_one = lambda p: (seen.append(id(p)), update(p))[1]  # type: ignore[method-assign,func-returns-value]
    one_step(state)
    assert sorted(seen) == sorted(id(parameter) for parameter in loaded.model.parameters())


def test_groups_learn_at_their_own_share_of_the_learning_rate() -> None:
    loaded = small_loaded()
    state = small_state(loaded, SGDConfig(), releases=True)
    state.optimizer.param_groups[0]["lr_scale"] = 16.0
    before = weights(loaded)
    gradients: dict[str, Tensor] = {}
    for name, parameter in loaded.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradients.__setitem__(name, grad.clone()))
    one_step(state, learning_rate=0.5)
    for name, after in weights(loaded).items():
        rate = 8.0 if after.ndim >= 2 else 0.5
        torch.testing.assert_close(after, before[name] - rate * gradients[name], rtol=1e-6, atol=1e-8)


class Counting(torch.optim.Optimizer):
    """Moves every weight by minus the number of the step, which it counts by group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["step"]


def test_what_is_counted_by_group_counts_steps_not_parameters() -> None:
    first, second, third = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    single = SingleSteps(optimizer := Counting([{"params": [first, second]}, {"params": [third]}]))
    for _ in range(3):
        for parameter in (third, first, second):
            parameter.grad = torch.ones(2)
            single.step(parameter)
            parameter.grad = None
        single.settle()
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert all(torch.equal(parameter, torch.full((2,), -6.0)) for parameter in (first, second, third))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]


# --- what must not happen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_reaches_no_weight(value: float) -> None:
    loaded = small_loaded()
    state = small_state(loaded, AdamWConfig(), releases=True)
    broken = "transformer.h.1.mlp.c_fc.weight"
    dict(loaded.named_parameters())[broken].register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), value))
    before = weights(loaded)
    message = rf"step 1: the gradient of {broken} is not finite .*; (\d+) tensors had been updated before"
    with pytest.raises(DivergedError, match=message) as caught:
        one_step(state)
    after = weights(loaded)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert all(after[name].isfinite().all() for name in after)
    assert f" {len(moved)} tensors had been updated" in str(caught.value)
    assert broken not in moved
    assert "transformer.wte.weight" not in moved, "it comes last in the backward pass"
    assert "transformer.ln_f.weight" in moved, "it comes first"


def test_a_non_finite_loss_moves_nothing() -> None:
    loaded = small_loaded()
    with torch.no_grad():
        loaded.model.transformer.wpe.weight[0] = float("nan")
    state = small_state(loaded, AdamWConfig(), releases=True)
    before = weights(loaded)
    with pytest.raises(DivergedError, match=r"the loss is not finite .*; nothing was updated"):
        one_step(state)
    for name, after in weights(loaded).items():
        assert torch.equal(after.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


@pytest.mark.parametrize(("count", "clip"), [(2, None), (1, 1.0)], ids=["two micro-batches", "clipping"])
def test_a_step_that_needs_all_gradients_is_refused(count: int, clip: float | None) -> None:
    state = small_state(small_loaded(), AdamWConfig(), releases=True)
    before = weights(state.loaded)
    batches = [MicroBatch(small_batch(number).batch) for number in range(count)]
    with pytest.raises(ValueError, match="one micro-batch a step, without clipping"):
        train_step(state, build_objective(SFTConfig()), batches, learning_rate=1e-3, max_grad_norm=clip)
    check_equal(before, weights(state.loaded))


def test_hooks_are_gone_after_the_step() -> None:
    """A backward pass of someone else's must not train the model."""
    loaded = small_loaded()
    state = small_state(loaded, SGDConfig(), releases=True)
    one_step(state)
    before = weights(loaded)
    sum(parameter.sum() for parameter in loaded.model.parameters()).backward()
    check_equal(before, weights(loaded))
    assert all(parameter.grad is not None for parameter in loaded.model.parameters())


# --- what it is for -------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made within the body took at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_gradient_is_gone_before_the_next_one_comes(name: str) -> None:
    """Against a step that keeps them, memory is lower by every gradient that came before, at every one that comes."""
    settings: dict[str, Any] = {"num_hidden_layers": 8, "hidden_size": 64}
    if name == "gpt2":
        settings = {"n_layer": 8, "n_embd": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

    def watched(releases: bool) -> list[tuple[int, int]]:
        """(bytes alive, of which this gradient) as each comes."""
        loaded = small_models.as_loaded(getattr(small_models, f"small_{name}")(**settings))
        choose_layout(loaded, "packed", 128)
        state = small_state(loaded, SGDConfig(), releases=releases)
        live, seen = LiveBytes(), []
        for parameter in loaded.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append((live.now, p.grad.nbytes)))
        with live:
            one_step(state)
        return seen

    kept, released = watched(False), watched(True)
    assert [size for _, size in kept] == [size for _, size in released]
    total, gone = sum(size for _, size in kept), 0
    for (with_all, size), (with_few, _) in zip(kept, released, strict=True):
        assert with_all - with_few == pytest.approx(gone, abs=0.01 * total)
        gone += size
    assert gone == total
