"""The least matrix products that give a packed row's loss and gradients exactly: what utilisation is measured by.

A product of R rows with a weight W takes 2·W·R FLOPs in the forward pass, 2·W·R for W's gradient if W is trained, and
2·W·R for its input's gradient if anything beneath learns. With T tokens, U distinct predictors (positions whose hidden
state predicts a target), S loss positions, A attention pairs and A_U pairs whose query is a predictor:

    blocks but the last    every product at T rows, attention over A pairs
    last block             keys and values at T rows; queries, output, MLP at U; attention over A_U pairs
    logits                 S rows
    attention, a pair      4·width forward (QKᵀ, PV); backward 2·width for each of dV and dP, and of dQ and dK
    LoRA of rank r         forward 2·r·(in + out)·R beside W's product; backward 2·r·out·R for each of dB and the
                           gradient of xA, 2·r·in·R for dA, and as much for the input's gradient if it is wanted

For full training that is 6·N_b·T + 6·V·D·S + attention, less what the last block leaves out; for LoRA 4·N_b·T +
4·V·D·S + adapters + attention, less that and the input gradients of the first block's queries, keys and values, whose
input does not learn. The last prompt token of a preference pair predicts the first token of both completions: one row
of U and two of S. Not counted, as in `flops.py`: recomputation, norms, activations, the optimizer.

The order assumed in a block is attention, then MLP on its result. In blocks of unknown make every product is counted
at T rows, and all input gradients in a block that learns. A norm or bias that is trained counts as beneath its block's
first products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from tunelab.cost.flops import attention_pairs
from tunelab.cost.shape import Block, ModelShape, Projection, Role
from tunelab.types import Batch

Pass = Literal["training", "inference", "reference"]
"""Forward and backward; forward; forward with adapters switched off."""

_PRUNED: frozenset[Role] = frozenset({"query", "output", "mlp_in", "mlp_out"})
"""What the last block computes at predictors only."""

_BEFORE: Mapping[Role, tuple[Role, ...]] = {
    "query": (),
    "key": (),
    "value": (),
    "output": ("query", "key", "value"),
    "mlp_in": ("query", "key", "value", "output"),
    "mlp_out": ("query", "key", "value", "output", "mlp_in"),
    "other": ("other",),
}
"""Which products of a block a product's input comes from."""


@dataclass(frozen=True)
class FloorFormula:
    """FLOPs as a linear function of a row's counts: T, U, S, A and A_U of the module's docstring."""

    per_token: int
    per_predictor: int
    per_loss_position: int
    per_pair: int
    per_predictor_pair: int

    def flops(self, batch: Batch) -> int:
        predictors, pairs = predictor_counts(batch)
        return (
            self.per_token * batch.num_tokens
            + self.per_predictor * predictors
            + self.per_loss_position * len(batch.targets)
            + self.per_pair * attention_pairs(batch)
            + self.per_predictor_pair * pairs
        )


def floor_flops(shape: ModelShape, batch: Batch, kind: Pass = "training") -> int:
    """The least FLOPs of one pass over `batch`; see the module's docstring.

    A reference pass is not part of `training`: add its own where one is made.
    """
    return floor_formula(shape, kind).flops(batch)


def predictor_counts(batch: Batch) -> tuple[int, int]:
    """(U, A_U): distinct loss positions, and the (query, key) pairs of those queries."""
    positions = batch.loss_positions.cpu().unique()
    starts = torch.tensor([segment.start for segment in batch.segments])
    prefixes = torch.tensor([segment.prefix_length for segment in batch.segments])
    segments = torch.searchsorted(starts, positions, right=True) - 1
    return len(positions), int((positions - starts[segments] + 1 + prefixes[segments]).sum())


@lru_cache(maxsize=16)
def floor_formula(shape: ModelShape, kind: Pass = "training") -> FloorFormula:
    """The coefficients for a model and a pass."""
    training, beneath = kind == "training", shape.embeddings_trained
    per_token = per_predictor = per_pair = per_predictor_pair = 0
    for number, block in enumerate(shape.blocks, 1):
        is_last = number == shape.num_layers
        block = _without_adapters(block) if kind == "reference" else block
        wide, narrow = _block_work(block, training, beneath)
        pairs = _attention_work(block, shape.attention_width, training, beneath)
        prune = is_last and block.is_known
        per_token += wide if prune else wide + narrow
        per_predictor += narrow if prune else 0
        per_pair += 0 if prune else pairs
        per_predictor_pair += pairs if prune else 0
        beneath = beneath or block.learns
    wide, narrow = _work(shape.head, training, input_gradient=beneath or shape.norm_trained)
    return FloorFormula(per_token, per_predictor, wide + narrow, per_pair, per_predictor_pair)


def _without_adapters(block: Block) -> Block:
    return replace(block, projections=tuple(replace(p, rank=0) for p in block.projections))


def _block_work(block: Block, training: bool, beneath: bool) -> tuple[int, int]:
    """FLOPs a row of the products that need every token, and of those that need predictors only in the last block."""
    wide = narrow = 0
    for projection in block.projections:
        gradient = training and any(_input_learns(block, role, beneath) for role, _ in projection.outputs)
        every, few = _work(projection, training, gradient)
        wide, narrow = wide + every, narrow + few
    return wide, narrow


def _input_learns(block: Block, role: Role, beneath: bool) -> bool:
    """Whether something before this product learns, so that its input's gradient is wanted."""
    return beneath or block.others_trained or block.learned(*_BEFORE[role])


def _work(projection: Projection, training: bool, input_gradient: bool) -> tuple[int, int]:
    """FLOPs a row of a product and its adapter, forward and backward: of the columns for every token, of the others."""
    learns = training and projection.adapter_trained
    weight_passes = 1 + (training and projection.trained) + (training and input_gradient)
    down_passes = 1 + learns + (training and input_gradient)  # x → xA
    up_passes = 1 + learns + (training and (learns or input_gradient))  # xA → xAB
    wide = narrow = 0
    for role, width in projection.outputs:
        work = 2 * width * (projection.in_features * weight_passes + projection.rank * up_passes)
        wide, narrow = (wide, narrow + work) if role in _PRUNED else (wide + work, narrow)
    shared = 2 * projection.in_features * projection.rank * down_passes
    if all(role in _PRUNED for role, _ in projection.outputs):
        return wide, narrow + shared
    return wide + shared, narrow


def _attention_work(block: Block, width: int, training: bool, beneath: bool) -> int:
    """FLOPs a (query, key) pair: QKᵀ and PV, and the gradients that reach something that learns."""
    query, key, value = (
        training and (_input_learns(block, role, beneath) or block.learned(role, "other"))
        for role in ("query", "key", "value")
    )
    gradients = value + (query or key) + query + key  # dV; dP; dQ, dK
    return 2 * width * (2 + gradients)
