"""Quarter against its equations in float64, its storage, its bits, and what gradient release asks of it."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tunelab.optim import quarter
from tunelab.optim.quarter import Quarter, quarter_state_bytes

BETAS, EPS, DECAY, CLIP = (0.8, 0.95), 1e-6, 0.1, 0.7


def _gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[np.ndarray]:
    """Rows and columns of unlike size, as an embedding's, and a step in the middle ten times the others."""
    random = np.random.default_rng(seed)
    scale = np.exp(random.normal(size=shape[0])).reshape(-1, *[1] * (len(shape) - 1))
    return [random.normal(size=shape) * scale * (10 if step == steps // 2 else 1) for step in range(steps)]


def _matrix_in_float64(weight: np.ndarray, gradients: list[np.ndarray], lr: float) -> np.ndarray:
    """The module's equations with moments that are not rounded."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        root = np.sqrt(square / (1 - BETAS[1] ** step)) + EPS
        clipped = gradient / max(1.0, math.sqrt(((gradient / root) ** 2).mean()) / CLIP)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * clipped
        weight = weight - lr * (mean / (1 - BETAS[0] ** step) / root + DECAY * weight)
    return weight


def _optimizer(parameters: list[nn.Parameter], lr: float, seed: int = 0) -> Quarter:
    return Quarter(parameters, lr=lr, betas=BETAS, eps=EPS, weight_decay=DECAY, clip_threshold=CLIP, seed=seed)


def _train(parameter: nn.Parameter, gradients: list[np.ndarray], lr: float, seed: int = 0) -> torch.Tensor:
    optimizer = _optimizer([parameter], lr, seed)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient).to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def _keep_moments_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, torch.Tensor] = {}
    for name in ("momentum", "square"):
        monkeypatch.setattr(
            quarter, f"encode_{name}", lambda values, *_, name=name: kept.update({name: values.clone()})
        )
        monkeypatch.setattr(
            quarter,
            f"decode_{name}",
            lambda codes, scales, columns, name=name: kept.get(name, torch.zeros(len(codes), columns)).clone(),
        )


def test_a_matrix_follows_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 steps with moments kept whole: nothing but float32 between them and the transcription."""
    _keep_moments_whole(monkeypatch)
    start, gradients = np.random.default_rng(1).normal(size=(7, 300)), _gradients((7, 300), 20)
    found = _train(nn.Parameter(torch.from_numpy(start).float()), gradients, lr=0.01)
    np.testing.assert_allclose(found.double().numpy(), _matrix_in_float64(start, gradients, lr=0.01), atol=2e-6)


def test_without_rounding_and_clipping_it_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    _keep_moments_whole(monkeypatch)
    start, gradients = np.random.default_rng(1).normal(size=(7, 300)), _gradients((7, 300), 20)
    ours, reference = (nn.Parameter(torch.from_numpy(start).float()) for _ in range(2))
    settings = {"lr": 0.01, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    optimizers = Quarter([ours], clip_threshold=1e9, **settings), torch.optim.AdamW([reference], **settings)
    for gradient in gradients:
        for parameter, optimizer in zip((ours, reference), optimizers, strict=True):
            parameter.grad = torch.from_numpy(gradient).float()
            optimizer.step()
    torch.testing.assert_close(ours, reference, atol=2e-6, rtol=0)


def test_four_bits_a_moment_are_right_on_average() -> None:
    """One run is off by a fraction of the way the weights went, the mean of many by a small part of that fraction."""
    start, gradients = np.random.default_rng(1).normal(size=(7, 300)), _gradients((7, 300), 20)
    exact = _matrix_in_float64(start, gradients, lr=0.01)
    found = np.stack(
        [_train(nn.Parameter(torch.from_numpy(start).float()), gradients, 0.01, s).double().numpy() for s in range(40)]
    )

    def size(difference: np.ndarray) -> float:
        return float(np.sqrt((difference**2).mean()))

    way = size(exact - start)
    assert 0.02 * way < size(found[0] - exact) < 0.3 * way
    assert size(found.mean(0) - exact) < 0.4 * size(found[0] - exact)


def test_bf16_weights_are_the_float32_ones_on_average() -> None:
    """Steps of a tenth of a spacing. The mean over seeds comes to the float32 weights."""
    gradients = [np.full((4, 256), 1.0)] * 20
    start = torch.full((4, 256), 1.0)
    exact = _train(nn.Parameter(start.clone()), gradients, lr=2**-11)
    found = torch.stack(
        [_train(nn.Parameter(start.bfloat16()), gradients, lr=2**-11, seed=seed).float() for seed in range(64)]
    )
    assert (exact - start).abs().mean() > 0.005
    assert found.mean().item() == pytest.approx(exact.mean().item(), abs=2e-5)
    assert set(found.unique().bfloat16().tolist()) == set(found.unique().tolist())


def test_a_vector_follows_adamw() -> None:
    start, gradients = np.random.default_rng(2).normal(size=11), _gradients((11,), 20)
    found = _train(nn.Parameter(torch.from_numpy(start).float()), gradients, lr=0.01)
    reference = nn.Parameter(torch.from_numpy(start))
    adamw = torch.optim.AdamW([reference], lr=0.01, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for gradient in gradients:
        reference.grad = torch.from_numpy(gradient)
        adamw.step()
    torch.testing.assert_close(found.double(), reference.detach(), atol=2e-6, rtol=0)


def test_more_dimensions_are_one() -> None:
    start, gradients = np.random.default_rng(3).normal(size=(6, 4, 5)), _gradients((6, 4, 5), 5)
    whole = _train(nn.Parameter(torch.from_numpy(start).float()), gradients, lr=0.1)
    flat = _train(
        nn.Parameter(torch.from_numpy(start.reshape(6, 20)).float()), [g.reshape(6, 20) for g in gradients], lr=0.1
    )
    assert torch.equal(whole.reshape(6, 20), flat)


def test_rows_at_a_time_are_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first step, which needs no moments from before: their random bits come in another order."""
    start, gradients = np.random.default_rng(4).normal(size=(33, 130)), _gradients((33, 130), 1)
    whole = _train(nn.Parameter(torch.from_numpy(start).float()), gradients, lr=0.01)
    monkeypatch.setattr(quarter, "CHUNK", 4 * 130)
    parts = _train(nn.Parameter(torch.from_numpy(start).float()), gradients, lr=0.01)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def _model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 200), nn.GELU(), nn.Linear(200, 1)).to(dtype)


def _steps(model: nn.Module, optimizer: Quarter, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        x = torch.randn(64, 20, generator=torch.Generator().manual_seed(step))
        target = x[:, :1].sin() + x[:, 1:2] * x[:, 2:3]
        loss = (model(x.to(next(model.parameters()).dtype)).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_problem_is_learned_as_by_adamw(dtype: torch.dtype) -> None:
    model, twin = _model(dtype), _model(torch.float32)
    losses = _steps(model, Quarter(model.parameters(), lr=1e-2), 0, 200)
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    reference = _steps(twin, adamw, 0, 200)  # type: ignore[arg-type]
    assert np.mean(losses[-20:]) < 0.1 * losses[0]
    assert np.mean(losses[-20:]) < 1.5 * np.mean(reference[-20:])


def test_the_same_seed_gives_the_same_weights_and_another_others() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        model = _model(torch.bfloat16)
        _steps(model, Quarter(model.parameters(), lr=1e-3, seed=seed), 0, 5)
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(0), weights(1), strict=True))


def test_unlike_parameters_get_unlike_bits() -> None:
    """Two equal parameters with equal gradients are rounded apart."""
    pair = [nn.Parameter(torch.ones(4, 256, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = Quarter(pair, lr=2**-10)
    for parameter in pair:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(*pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_saved_and_loaded_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    model = _model(dtype)
    optimizer = Quarter(model.parameters(), lr=1e-3, seed=3)
    _steps(model, optimizer, 0, 4)
    resumed = copy.deepcopy(model)
    loaded = Quarter(resumed.parameters(), lr=1e-3, seed=3)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state, other in zip(optimizer.state.values(), loaded.state.values(), strict=True):
        assert {name: getattr(value, "dtype", int) for name, value in state.items()} == {
            name: getattr(value, "dtype", int) for name, value in other.items()
        }
        assert all(isinstance(value, (int, torch.Tensor)) for value in state.values())
    _steps(model, optimizer, 4, 4)
    _steps(resumed, loaded, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_parameter_at_a_time_in_any_order_is_all_at_once(dtype: torch.dtype) -> None:
    """As gradient release has it: the others have no gradient."""
    model = _model(dtype)
    alone = copy.deepcopy(model)
    together, apart = Quarter(model.parameters(), lr=1e-3), Quarter(alone.parameters(), lr=1e-3)
    for step in range(3):
        for parameter in reversed(list(zip(model.parameters(), alone.parameters(), strict=True))):
            random = torch.Generator().manual_seed(step)
            parameter[0].grad = torch.randn(parameter[0].shape, generator=random).to(dtype)
            parameter[1].grad = parameter[0].grad.clone()
            apart.step()
            parameter[1].grad = None
        together.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def test_rows_without_gradient_move_by_decay_alone() -> None:
    """An embedding's unseen tokens; a gradient of zeros and nothing else gives no NaN."""
    weight = nn.Parameter(torch.ones(4, 130))
    optimizer = _optimizer([weight], lr=0.1)
    weight.grad = torch.randn(4, 130, generator=torch.Generator().manual_seed(0))
    weight.grad[2] = 0.0
    optimizer.step()
    torch.testing.assert_close(weight.detach()[2], torch.full((130,), 1 - 0.1 * DECAY))
    silent = nn.Parameter(torch.ones(4, 130))
    silent.grad = torch.zeros(4, 130)
    _optimizer([silent], lr=0.1).step()
    torch.testing.assert_close(silent.detach(), torch.full((4, 130), 1 - 0.1 * DECAY))


def test_bytes_of_state() -> None:
    """Of a matrix: two half bytes a weight, two scales for 128. Of a vector: two float32."""
    matrix, vector = (nn.Parameter(torch.zeros(*shape, dtype=torch.bfloat16)) for shape in ((512, 384), (100,)))
    optimizer = Quarter([matrix, vector], lr=1e-3)
    for parameter in (matrix, vector):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def measured(parameter: nn.Parameter) -> int:
        return sum(v.untyped_storage().nbytes() for v in optimizer.state[parameter].values() if torch.is_tensor(v))

    assert measured(matrix) == 2 * (512 * 384 // 2 + 4 * 512 * 3) == quarter_state_bytes((512, 384))
    assert measured(vector) == 8 * 100 == quarter_state_bytes((100,))


class _Floats(TorchDispatchMode):
    """The most values of a float32 tensor that any operation gave back."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


def test_no_float32_copy_of_a_matrix_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarter, "CHUNK", 4096)
    weight = nn.Parameter(torch.zeros(256, 256, dtype=torch.bfloat16))
    optimizer = Quarter([weight], lr=1e-3)
    weight.grad = torch.ones_like(weight)
    with _Floats() as floats:
        optimizer.step()
    assert 0 < floats.largest <= 4096


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float16"):
        Quarter([nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))])
