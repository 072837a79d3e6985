"""A model's parameters as bytes: where each lies, whether it learns, and how many bytes a number of it takes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from math import prod

from torch import nn

from tunelab.cost.shape import decoder_layers


@dataclass(frozen=True)
class Weight:
    """One parameter, tied ones once.

    block: the decoder layer it lies in, None outside of them. trained: it has a gradient. added: it belongs to an
    adapter. itemsize: bytes of a number of it, or of its gradient; `bytes` of a packed one are fewer.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None
    trained: bool
    added: bool
    itemsize: int
    bytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


def read_weights(
    model: nn.Module,
    *,
    itemsize: int,
    added_itemsize: int,
    base: Container[int],
    packed_bytes: Callable[[int], int] | None = None,
) -> tuple[Weight, ...]:
    """Every parameter of `model`, a skeleton on torch's meta device or a real one.

    itemsize: bytes of a number of the model's own parameters (those whose `id` is in `base`); added_itemsize: of an
    adapter's. packed_bytes: what a frozen matrix of the blocks takes in 4 bits, by its numbers; None where none is
    packed.
    """
    found = []
    for name, parameter, block in _placed(model):
        added = id(parameter) not in base
        size = added_itemsize if added else itemsize
        matrix = not added and not parameter.requires_grad and block is not None and parameter.ndim == 2
        numel = parameter.numel()
        held = packed_bytes(numel) if packed_bytes is not None and matrix else numel * size
        found.append(Weight(name, tuple(parameter.shape), block, parameter.requires_grad, added, size, held))
    return tuple(found)


def _placed(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    blocks = {id(p): number for number, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        yield name, parameter, blocks.get(id(parameter))
