"""4-bit bases (QLoRA, Dettmers et al. 2023), through bitsandbytes: linear layers of the body are packed, two weights a
byte with a scale for every 64; embeddings, norms, biases and the output head stay what they are.

    quantise(model, layers, settings, device)      # in place, layer by layer
    dense(layer.weight)                            # (out, in), made anew at each call
    dequantise(model)                              # in place, back to plain layers

bitsandbytes is imported here alone, and only once a recipe asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunelab.config import ModelConfig
from tunelab.errors import MachineError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import it tells of kernels that it has not got

BLOCK = 64
"""Weights that share a scale (bitsandbytes' default, and the paper's)."""

SCALES_BLOCK = 256
"""Scales that share a scale, with double quantisation (paper, sec. 3)."""

_MARK = "is_loaded_in_4bit"
"""The attribute by which transformers and peft know such a model."""


@dataclass(frozen=True)
class FourBit:
    """quant_type: nf4 or fp4. double_quant: the scales themselves in 8 bits. compute_dtype: of the products, where
    autocast does not say otherwise.
    """

    quant_type: str
    double_quant: bool
    compute_dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, compute_dtype: torch.dtype) -> FourBit:
        """What `model` of a recipe asks for. Raises MachineError where bitsandbytes is not installed."""
        _import_bitsandbytes()
        double = config.bnb_4bit_use_double_quant
        return cls(config.bnb_4bit_quant_type or "nf4", True if double is None else double, compute_dtype)

    def for_transformers(self) -> BitsAndBytesConfig:
        """The same for `from_pretrained`, which then packs each tensor as it is read."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype,
        )


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether its linear layers are packed, or (a skeleton on `meta`) will be."""
    return bool(getattr(model, _MARK, False))


def mark_quantised(model: PreTrainedModel) -> None:
    """For a skeleton, whose modules stay plain: what is checked before weights are read knows that they will not be."""
    setattr(model, _MARK, True)


def quantise(model: PreTrainedModel, layers: Mapping[str, nn.Module], settings: FourBit, device: torch.device) -> None:
    """Pack the linear layers `layers` of `model`, by full name, one after another, and bring it to `device`.

    For weights that transformers does not read itself. Conv1D becomes a linear layer with the transposed weight. Every
    parameter is frozen.
    """
    bnb = _import_bitsandbytes()
    for name, layer in layers.items():
        weight: Any = layer.weight
        bias: Any = layer.bias
        weight = weight.detach().T if isinstance(layer, Conv1D) else weight.detach()
        with torch.device("meta"):
            packed = bnb.nn.Linear4bit(
                weight.shape[1],
                weight.shape[0],
                bias=bias is not None,
                compute_dtype=settings.compute_dtype,
                compress_statistics=settings.double_quant,
                quant_type=settings.quant_type,
            )
        packed.weight = bnb.nn.Params4bit(
            weight.contiguous(),
            requires_grad=False,
            compress_statistics=settings.double_quant,
            quant_type=settings.quant_type,
            module=packed,
        ).to(device)
        packed.bias = bias
        packed.source_cls = type(layer)  # as transformers notes it
        model.set_submodule(name, packed)
    mark_quantised(model)
    settle(model)
    model.to(device)


def settle(model: PreTrainedModel) -> None:
    """Freeze a packed model, and keep it in one format.

    On CPUs with bf16 instructions bitsandbytes otherwise packs a weight anew at its first forward pass in evaluation
    mode, for a kernel that computes in bf16, that training cannot use, and that fails where a row is no multiple of
    `BLOCK` (0.50).
    """
    model.requires_grad_(False)
    for layer in packed_layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """Every packed layer by its full name, an adapter's base layers included."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_packed(module.weight)
    }


def is_packed(weight: Any) -> bool:
    return getattr(weight, "quant_state", None) is not None


def shape_of(weight: Tensor) -> torch.Size:
    """(out, in) of a weight, packed or not."""
    return weight.quant_state.shape if is_packed(weight) else weight.shape  # type: ignore[attr-defined]


def dense(weight: Tensor) -> Tensor:
    """`weight` itself, or what a packed one stands for: (out, in), in the type it had before."""
    if not is_packed(weight):
        return weight
    bnb = _import_bitsandbytes()
    found: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    return found


def dequantise(model: PreTrainedModel) -> None:
    """Put plain layers with the weights' dequantised values in the place of the packed ones: GPT-2's are Conv1D again.

    Exact: the model computes what it did, to the rounding of another order of sums.
    """
    for name, packed in packed_layers(model).items():
        weight = dense(packed.weight)
        if packed.source_cls is Conv1D:
            with torch.device("meta"):
                plain: nn.Module = Conv1D(weight.shape[0], weight.shape[1])
            weight = weight.T.contiguous()
        else:
            with torch.device("meta"):
                plain = nn.Linear(weight.shape[1], weight.shape[0], bias=packed.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = packed.bias
        model.set_submodule(name, plain)
    for holder, attribute in ((model, "hf_quantizer"), (model, "quantization_method"), (model, _MARK)):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False


def quantised_bytes(num_weights: int, double_quant: bool = True) -> int:
    """Of one packed weight matrix: half a byte a weight, its scales, and the tables of their values.

    Single: a float32 scale for each `BLOCK`, 4.5 bits a weight. Double (Dettmers et al. 2023, sec. 3): 8 bits for each,
    and a float32 for each `SCALES_BLOCK` of those, 4.127 bits a weight.
    """
    scales = -(-num_weights // BLOCK)
    tables = 16 * 4
    if not double_quant:
        return -(-num_weights // 2) + 4 * scales + tables
    return -(-num_weights // 2) + scales + 4 * (-(-scales // SCALES_BLOCK)) + tables + 256 * 4 + 4


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Weights they stand for: a packed parameter holds two a byte."""
    return sum(shape_of(parameter).numel() for parameter in parameters)


def check_bitsandbytes() -> None:
    """Raises MachineError where it is not installed."""
    _import_bitsandbytes()


def _import_bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MachineError(
            "model.load_in_4bit: bitsandbytes is not installed; pip install 'tunelab[quantization]'"
        ) from error
    return bitsandbytes
