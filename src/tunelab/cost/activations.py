"""Bytes of a block's activations, by the way it is computed.

Widths, of a block: D hidden, A attention (query heads × head size), P queries | keys | values (A + 2 × key-value
width), M the MLP's first products (4D in GPT-2; gate | up, 2I, in Llama), I its second product's input. T tokens, Q
positions that are queries (all, but in the last block of the fused path). r bytes of a number of the residual stream,
which has the weights' type; a, of the products.

    fused         kept from forward to backward: x (D, r), queries | keys | values (P, a) at T; the attention's output
                  (A, a), the residual between (D, r), the MLP before its activation (M, a) at Q; x·Aᵀ of each LoRA,
                  and of DoRA each product's output
                  (`models/fused/blocks.py`, `models/segments.py`)
    own, padded   each module keeps its input, and every composite its parts: a LayerNorm's output (RMSNorm: two
                  tensors) beside the residual, a GELU's input and output (the composite `gelu_new`: five tensors), a
                  SwiGLU's gate, its SiLU, up, and their product

What the backward pass takes beyond that is largest in the MLP: the activation and its gradient, or the gradients on
both its sides (and a SwiGLU's SiLU), beside the gradient of the block's result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunelab.cost.rows import Row
from tunelab.cost.shape import Block, ModelShape

Path = Literal["fused", "own", "padded"]
"""Fused blocks on packed rows; the model's own modules on packed rows, or on padded ones."""


@dataclass(frozen=True)
class Items:
    """Bytes of a number: of the residual stream and of the products' operands and results."""

    residual: int
    product: int

    @property
    def narrow(self) -> int:
        """Of a copy of the residual stream (or its gradient) in the products' type, 0 where it is its own."""
        return self.product if self.product != self.residual else 0


@dataclass(frozen=True)
class BlockBytes:
    """boundary: the block's input. front: that and what its first half keeps. kept: everything from forward to
    backward. forward: beyond the input, the most at one moment of a forward pass that keeps nothing. mlp, first: beyond
    kept and beyond front, the most in the backward passes of the block's second and first half.
    """

    boundary: int
    front: int
    kept: int
    forward: int
    mlp: int
    first: int


def block_bytes(block: Block, shape: ModelShape, row: Row, path: Path, items: Items) -> BlockBytes:
    """Of one block and row. `row.kept` of the fused path's last block is fewer than `row.tokens`."""
    d, attention, packed, inner, active = _widths(block, shape)
    r, a, tokens, kept = items.residual, items.product, row.tokens, row.kept
    gated = block.is_known and inner > active
    ranks = sum(p.rank + (p.out_features if p.rescaled else 0) for p in block.projections) * tokens * a
    boundary = tokens * d * r
    front = boundary + tokens * packed * a
    back = kept * (attention * a + d * r + inner * a) + ranks
    forward = tokens * packed * a + kept * ((attention + d + inner + active) * a + 2 * d * r)
    mlp = kept * ((4 if gated else 2) * active * a + d * (r + items.narrow))
    first = tokens * (packed * a + 3 * d * r + 2 * d * a)
    if path != "fused":
        front += tokens * (2 if shape.root_mean_square else 1) * d * a
        back += kept * ((2 if shape.root_mean_square else 1) * d + (2 if gated else shape.gelu_tensors) * active) * a
    return BlockBytes(boundary, front, front + back, forward, mlp, first)


def _widths(block: Block, shape: ModelShape) -> tuple[int, int, int, int, int]:
    """D, A, P, M, I. Of a block of unknown make, every product's output is taken for the MLP's."""
    if not block.is_known:
        other = block.width("other")
        return shape.hidden_size, 0, 0, other, other
    active = next(p.in_features for p in block.projections if p.outputs[0][0] == "mlp_out")
    return (
        shape.hidden_size,
        shape.attention_width,
        block.width("query", "key", "value"),
        block.width("mlp_in"),
        active,
    )
