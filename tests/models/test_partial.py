"""Partial tuning: what is trained, and that nothing below it is paid for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from tests.models.small_models import as_loaded, small_gpt2, small_llama
from tunelab.config.adapters import PartialConfig
from tunelab.errors import ConfigError
from tunelab.models.adapters import adapt_skeleton, attach_adapter
from tunelab.models.engine import choose_layout, compute_logprobs
from tunelab.models.loaded import LoadedModel
from tunelab.models.packed import _probe_batch

Build = Callable[[], PreTrainedModel]


def gpt2() -> PreTrainedModel:
    return small_gpt2(n_layer=3, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


def llama() -> PreTrainedModel:
    return small_llama(num_hidden_layers=3)


def opt() -> PreTrainedModel:
    """Its final norm is declared before its blocks."""
    config = OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2)
    return OPTForCausalLM(config)


def bloom() -> PreTrainedModel:
    """A norm of the embeddings stands beside the blocks."""
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=3, n_head=2))


LAST = [
    (gpt2, "transformer.h.{}.", "transformer.ln_f."),
    (llama, "model.layers.{}.", "model.norm."),
    (opt, "model.decoder.layers.{}.", "model.decoder.final_layer_norm."),
    (bloom, "transformer.h.{}.", "transformer.ln_f."),
]


def trained(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("build", "block", "norm"), LAST, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_last_blocks_and_the_final_norm(build: Build, block: str, norm: str, count: int) -> None:
    model = build()
    adapt_skeleton(model, PartialConfig(last_layers=count))
    wanted = (norm, *(block.format(number) for number in range(3 - count, 3)))
    expected = {name for name, _ in model.named_parameters() if name.startswith(wanted)}
    assert trained(model) == expected
    assert sum(name.startswith(norm) for name in expected) >= 1


def test_biases_alone() -> None:
    loaded = as_loaded(gpt2())
    attach_adapter(loaded, PartialConfig(biases=True), seed=0)
    assert trained(loaded.model) == {name for name, _ in loaded.model.named_parameters() if name.endswith(".bias")}
    d = 32  # of a block: two norms, queries|keys|values, output, up, down
    assert loaded.num_trainable_parameters == 3 * (2 * d + 3 * d + d + 4 * d + d) + d
    assert loaded.adapter is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"biases": True}, r"adapter\.biases: LlamaForCausalLM has no bias; use last_layers, or another adapter"),
        ({"last_layers": 4}, r"adapter\.last_layers: 4 is more than the 3 blocks of the model"),
    ],
)
def test_what_a_model_does_not_have(config: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach_adapter(as_loaded(llama()), PartialConfig(**config), seed=0)


def gradients(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    logprobs = compute_logprobs(loaded, _probe_batch(loaded.model))
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    return {name: p.grad for name, p in loaded.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("build", "config"), [(gpt2, {"last_layers": 2}), (llama, {"last_layers": 2}), (gpt2, {"biases": True})]
)
@pytest.mark.parametrize(("layout", "kernels"), [("packed", "auto"), ("packed", "plain"), ("padded", "auto")])
def test_gradients_are_those_of_full_tuning(build: Build, config: dict, layout: str, kernels: str) -> None:
    part, whole = as_loaded(build()), as_loaded(build())
    attach_adapter(part, PartialConfig(**config), seed=0)
    for loaded in (part, whole):
        choose_layout(loaded, layout, 16, kernels)  # type: ignore[arg-type]
    found, expected = gradients(part), gradients(whole)
    assert found.keys() == trained(part.model)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_backward_pass_ends_at_the_first_trained_block(build: Build, count: int) -> None:
    """Counted in autograd's graph: a block's functions are there once for each block that a gradient passes."""
    loaded = as_loaded(build())
    attach_adapter(loaded, PartialConfig(last_layers=count), seed=0)
    choose_layout(loaded, "packed", 16)
    assert loaded.shortcuts.fused_blocks
    nodes, seen = [compute_logprobs(loaded, _probe_batch(loaded.model)).grad_fn], set()
    names = []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        nodes += [parent for parent, _ in node.next_functions]
    for function in ("_BlockInput", "_SegmentAttention", "_BlockOutput"):
        assert sum(function in name for name in names) == count
    assert not any("Embedding" in name for name in names)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_step_moves_nothing_else(build: Build) -> None:
    loaded, before = as_loaded(build()), dict(build().named_parameters())
    attach_adapter(loaded, PartialConfig(last_layers=1), seed=0)
    choose_layout(loaded, "packed", 16)
    gradients(loaded)
    torch.optim.SGD([p for p in loaded.model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, p in loaded.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained(loaded.model)
