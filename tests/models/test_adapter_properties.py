"""What holds of every adapter, whatever its kind: on tiny GPT-2 (Conv1D) and Llama (nn.Linear). peft is the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.models.adapter_kinds import BUILDS, KINDS, Kind
from tests.models.small_models import save_folder
from tunelab.config import ModelConfig
from tunelab.models.adapters import adapter_disabled, attach_adapter, can_merge, merge_adapter
from tunelab.models.checkpointing import enable_checkpointing
from tunelab.models.engine import choose_layout, compute_logprobs
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import load_model
from tunelab.models.packed import _probe_batch
from tunelab.models.quantised import dequantise
from tunelab.models.saving import save_model, weights_fingerprint

IDS = torch.tensor([[5, 9, 700, 3, 41, 8]])
CASES = [pytest.param(kind, build, id=f"{kind.name}-{build}") for kind in KINDS for build in kind.builds]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: save_folder(build(), root / name) for name, build in BUILDS.items()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(kind: Kind, place: Path) -> ModelConfig:
    return ModelConfig(name=str(place), device="cpu", load_in_4bit=kind.four_bit)


def adapted(kind: Kind, place: Path, learnt: bool = True, kernels: str = "auto") -> LoadedModel:
    """The base with a new adapter; `learnt`: every one of its values has moved, as after training."""
    loaded = load_model(config_of(kind, place))
    attach_adapter(loaded, kind.config, seed=0)
    if learnt:
        move(loaded)
    choose_layout(loaded, "packed", 16, kernels)  # type: ignore[arg-type]
    return loaded


def move(loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(loaded).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def trained(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in loaded.named_parameters() if parameter.requires_grad}


def base_of(kind: Kind, place: Path) -> LoadedModel:
    """The model without an adapter, computed by the same functions."""
    loaded = load_model(config_of(kind, place))
    choose_layout(loaded, "packed", 16, "auto" if kind.fused else "plain")
    return loaded


def scores(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        return compute_logprobs(loaded, _probe_batch(loaded.model))


def gradients(loaded: LoadedModel, times: int = 1) -> dict[str, Tensor]:
    """Of a loss that weighs every target differently."""
    for parameter in trained(loaded).values():
        parameter.grad = None
    for _ in range(times):
        logprobs = compute_logprobs(loaded, _probe_batch(loaded.model))
        (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    return {name: p.grad.clone() for name, p in trained(loaded).items() if p.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-9)).item()


@pytest.mark.parametrize(("kind", "build"), CASES)
def test_at_first_it_changes_nothing(kind: Kind, build: str, folders: dict[str, Path]) -> None:
    found, base = (scores(x) for x in (adapted(kind, folders[build], learnt=False), base_of(kind, folders[build])))
    if kind.start == "bits":
        assert torch.equal(found, base)
    elif kind.start == "rounding":
        torch.testing.assert_close(found, base, atol=2e-5, rtol=1e-5)
    else:
        assert not torch.allclose(found, base, atol=1e-3)


@pytest.mark.parametrize(("kind", "build"), CASES)
def test_it_alone_is_trained_and_has_the_papers_number_of_parameters(
    kind: Kind, build: str, folders: dict[str, Path]
) -> None:
    loaded = adapted(kind, folders[build])
    before, start = weights_fingerprint(loaded.model), scores(loaded)
    parameters = trained(loaded)
    assert sum(p.numel() for p in parameters.values()) == kind.count(BUILDS[build]()) == loaded.num_trainable_parameters
    found = gradients(loaded)
    assert found.keys() == parameters.keys()
    torch.optim.SGD(parameters.values(), lr=0.01).step()
    assert weights_fingerprint(loaded.model) == before
    assert not torch.allclose(scores(loaded), start, atol=1e-3)
    assert {p.dtype for p in parameters.values()} == {torch.float32}


@pytest.mark.parametrize(("kind", "build"), CASES)
def test_switched_off_it_is_the_base_and_then_on_again(kind: Kind, build: str, folders: dict[str, Path]) -> None:
    loaded, base = adapted(kind, folders[build]), base_of(kind, folders[build])
    on = scores(loaded)
    with adapter_disabled(loaded):
        off = scores(loaded)
    assert (on - off).abs().max() > 0.01, "the control: the adapter must matter"
    torch.testing.assert_close(off, scores(base), atol=2e-5, rtol=1e-5)
    if "pissa" not in kind.name:
        assert weights_fingerprint(loaded.model) == weights_fingerprint(base.model)
        assert torch.equal(off, scores(base))
    assert torch.equal(scores(loaded), on)


@pytest.mark.parametrize(("kind", "build"), CASES)
def test_saved_and_loaded_it_has_the_same_bits(
    kind: Kind, build: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded = adapted(kind, folders[build])
    save_model(loaded, tmp_path)
    config = config_of(kind, tmp_path)
    kept = load_model(config, adapters="keep")
    choose_layout(kept, "packed", 16)
    assert weights_fingerprint(kept.model) == weights_fingerprint(loaded.model)
    assert torch.equal(scores(kept), scores(loaded))
    expected, found = gradients(loaded), gradients(kept)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (tmp_path / "again").mkdir()
    save_model(kept, tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name

    used = load_model(config)
    choose_layout(used, "packed", 16)
    assert (used.adapter is None) == (kind.merges and not kind.four_bit)
    torch.testing.assert_close(scores(used), scores(loaded), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("kind", "build"), CASES)
def test_stock_peft_opens_it_on_the_original_weights(
    kind: Kind, build: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded = adapted(kind, folders[build])
    save_model(loaded, tmp_path)
    packing = {}
    if kind.four_bit:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        packing = {"quantization_config": settings}
    stock = AutoModelForCausalLM.from_pretrained(folders[build], dtype=torch.float32, **packing)
    for module in stock.modules():  # in evaluation bitsandbytes would compute in bf16, and fails at 96 columns
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    stock = PeftModel.from_pretrained(stock, tmp_path).eval()
    expected = load_model(config_of(kind, tmp_path), adapters="keep")
    with torch.no_grad():
        if can_merge(loaded):
            torch.testing.assert_close(stock(IDS).logits, expected.model(IDS).logits, atol=1e-5, rtol=1e-5)
        logits = stock(IDS).logits[0, -IDS.shape[1] : -1].log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]
    torch.testing.assert_close(logits, ours(loaded), atol=1e-5, rtol=1e-5)


def ours(loaded: LoadedModel) -> Tensor:
    """log p of IDS[1:] through the engine."""
    from dataclasses import replace

    from tunelab.types import Segment

    count = IDS.shape[1]
    batch = replace(
        _probe_batch(loaded.model),
        input_ids=IDS[0],
        position_ids=torch.arange(count),
        segments=(Segment(0, count),),
        loss_positions=torch.arange(count - 1),
        targets=IDS[0, 1:],
        sequence_ids=torch.zeros(count - 1, dtype=torch.long),
        num_sequences=1,
    )
    with torch.no_grad():
        return compute_logprobs(loaded, batch)


@pytest.mark.parametrize(
    ("kind", "build"),
    [case for case in CASES if case.values[0].merges],  # type: ignore[union-attr]
)
def test_merged_it_is_a_plain_model_that_computes_the_same(
    kind: Kind, build: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded = adapted(kind, folders[build])
    expected = scores(loaded)
    merge_adapter(loaded)
    choose_layout(loaded, "packed", 16)
    torch.testing.assert_close(scores(loaded), expected, atol=1e-4, rtol=1e-5)
    plain = BUILDS[build]()
    assert [(name, type(m)) for name, m in loaded.model.named_modules()] == [
        (name, type(m)) for name, m in plain.named_modules()
    ]
    assert list(trained(loaded)) == [name for name, _ in plain.named_parameters()]
    save_model(loaded, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, loaded.model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "build"), CASES)
def test_fused_or_not_the_gradients_are_the_same(kind: Kind, build: str, folders: dict[str, Path]) -> None:
    """Against peft's own modules under the same packed row."""
    ours, peft_s = adapted(kind, folders[build]), adapted(kind, folders[build], kernels="plain")
    assert ours.shortcuts.fused_blocks == kind.fused, ours.blocks_reason
    assert not peft_s.shortcuts.fused_blocks
    torch.testing.assert_close(scores(ours), scores(peft_s), atol=2e-5, rtol=1e-5)
    found, expected = gradients(ours), gradients(peft_s)
    assert found.keys() == expected.keys()
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize(("kind", "build"), CASES)
def test_gradient_checkpointing_and_accumulation(kind: Kind, build: str, folders: dict[str, Path]) -> None:
    plain, checkpointed = adapted(kind, folders[build]), adapted(kind, folders[build])
    enable_checkpointing(checkpointed.model)
    if "dropout" not in kind.name:
        for loaded in (plain, checkpointed):
            loaded.model.train()
    expected, found, twice = gradients(plain), gradients(checkpointed), gradients(plain, times=2)
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-5
        assert relative(twice[name], 2 * gradient) < 1e-5


@pytest.mark.parametrize("build", ["gpt2", "llama"])
def test_a_quantised_base_stands_for_its_dequantised_weights(build: str, folders: dict[str, Path]) -> None:
    loaded = load_model(ModelConfig(name=str(folders[build]), device="cpu", load_in_4bit=True))
    plain = load_model(ModelConfig(name=str(folders[build]), device="cpu"))
    packed = loaded.model(IDS).logits
    assert (packed - plain.model(IDS).logits).abs().max() > 0.01, "the control: four bits are few"
    dequantise(loaded.model)
    torch.testing.assert_close(loaded.model(IDS).logits, packed, atol=1e-5, rtol=1e-5)
