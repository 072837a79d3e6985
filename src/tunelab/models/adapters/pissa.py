"""PiSSA (Meng et al. 2024): the adapter starts as the r largest singular directions of each weight, which leave it.

    W = U·S·Vᵀ,  B = U_r·√(S_r/s),  A = √(S_r/s)·V_rᵀ,  W_res = W − s·B·A        (their eq. 2 to 4, with LoRA's s)

The base is no longer the model that was loaded, so three things differ from LoRA. Each layer keeps A₀ and B₀ as
buffers, and they are part of a base's fingerprint. "Switched off" means A₀ and B₀ in the place of A and B: the model as
it started, which W_res alone is not. And a saved adapter stands on the original weights, as peft converts it
(`path_initial_model_for_weight_conversion`): s·B·A − s·B₀·A₀ is a LoRA of rank 2r, [B | −B₀]·[A; A₀]. To go on
training, the same file gives back A, B, A₀ and B₀, and by the same subtraction W_res to the bit.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunelab.manifest import PISSA

if TYPE_CHECKING:
    from peft import LoraConfig

INITIAL = ("initial_down", "initial_up")
"""Names of a layer's buffers."""


def is_pissa(init_lora_weights: bool | str) -> bool:
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith("pissa")


def has_pissa(model: nn.Module) -> bool:
    return any(hasattr(module, INITIAL[0]) for module in model.modules())


@torch.no_grad()
def move_directions(model: nn.Module, name: str, init: str) -> None:
    """From each weight beside an adapter `name` into that adapter, in float32 whatever the weight's type.

    init: `pissa`, or `pissa_niter_N` for Halko's randomised SVD in N rounds, which draws from the global generator.
    """
    for layer in _layers(model, name):
        weight = _output_first(layer)
        rank, scaling = layer.r[name], layer.scaling[name]
        if init == "pissa":
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            left, values, right = left[:, :rank], values[:rank], right[:rank]
        else:
            left, values, right = torch.svd_lowrank(weight, rank, niter=int(init.removeprefix("pissa_niter_")))
            right = right.T
        root = (values / scaling).sqrt()
        take_out(layer, name, root[:, None] * right, left * root)


@torch.no_grad()
def take_out(layer: Any, name: str, down: Tensor, up: Tensor) -> None:
    """Subtract s·B₀·A₀ from the weight of `layer`, and put A₀ (r, in) and B₀ (out, r) into its adapter."""
    base = layer.get_base_layer()
    rest = _output_first(layer) - layer.scaling[name] * up @ down
    base.weight.data.copy_(rest.T if isinstance(base, Conv1D) else rest)
    for key, module, value in zip(INITIAL, (layer.lora_A[name], layer.lora_B[name]), (down, up), strict=True):
        module.weight.data.copy_(value)
        layer.register_buffer(key, module.weight.detach().clone())


@contextmanager
def as_started(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, `model` computes what it did before its first step: the function of the weights as they were loaded."""
    layers = [layer for layer in _layers(model, name) if hasattr(layer, INITIAL[0])]
    biases = [layer.lora_B[name].bias for layer in layers if layer.lora_bias[name]]
    learnt = [bias.data for bias in biases]
    _exchange(layers, name)
    for bias in biases:
        bias.data = torch.zeros_like(bias)
    try:
        yield
    finally:
        _exchange(layers, name)
        for bias, value in zip(biases, learnt, strict=True):
            bias.data = value


def to_lora(
    model: nn.Module, tensors: Mapping[str, Tensor], config: LoraConfig, folder: Path
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter's tensors (peft's names) as a LoRA of rank 2r on the original weights, and its config.

    What it was is noted in `folder`.
    """
    buffers = dict(model.named_buffers())
    joined = dict(tensors)
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        if part == "A.weight":
            joined[key] = torch.cat((tensor, buffers[f"{layer}.{INITIAL[0]}"]), dim=0)
        elif part == "B.weight":
            joined[key] = torch.cat((tensor, -buffers[f"{layer}.{INITIAL[1]}"]), dim=1)
    plain = copy.copy(config)
    plain.r = 2 * config.r
    # s stays: α/r, or α/√r with rank stabilisation.
    plain.lora_alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    (folder / PISSA).write_text(json.dumps({"r": config.r, "lora_alpha": config.lora_alpha}))
    return joined, plain


def from_lora(
    tensors: Mapping[str, Tensor], config: LoraConfig, folder: Path
) -> tuple[dict[str, Tensor], LoraConfig, dict[str, Tensor]]:
    """The inverse: the adapter's tensors, its config, and A₀ and B₀ under the names of A and B.

    What was saved otherwise comes back as it is, without A₀ and B₀.
    """
    if not (folder / PISSA).is_file():
        return dict(tensors), config, {}
    config = copy.copy(config)
    for field, value in json.loads((folder / PISSA).read_text()).items():
        setattr(config, field, value)
    learnt, initial = dict(tensors), {}
    for key, tensor in tensors.items():
        if key.endswith("lora_A.weight"):
            learnt[key], initial[key] = tensor[: config.r], tensor[config.r :]
        elif key.endswith("lora_B.weight"):
            learnt[key], initial[key] = tensor[:, : config.r], -tensor[:, config.r :]
    return learnt, config, initial


def restore_rest(model: nn.Module, name: str, initial: Mapping[str, Tensor]) -> None:
    """Take A₀ and B₀ out of the original weights again. The adapter's own values are to be set afterwards."""
    for path, layer in model.named_modules():
        down = initial.get(f"base_model.model.{path}.lora_A.weight")
        if down is not None:
            device = layer.lora_A[name].weight.device
            up = initial[f"base_model.model.{path}.lora_B.weight"]
            take_out(layer, name, down.to(device).contiguous(), up.to(device).contiguous())


def _layers(model: nn.Module, name: str) -> list[Any]:
    return [module for module in model.modules() if name in getattr(module, "lora_A", ())]


def _output_first(layer: Any) -> Tensor:
    """(out, in) float32 weight beside the adapter."""
    base = layer.get_base_layer()
    weight = base.weight.detach().float()
    return weight.T if isinstance(base, Conv1D) else weight


def _exchange(layers: list[Any], name: str) -> None:
    for layer in layers:
        for key, module in zip(INITIAL, (layer.lora_A[name], layer.lora_B[name]), strict=True):
            learnt = module.weight.data
            module.weight.data = getattr(layer, key)
            setattr(layer, key, learnt)
