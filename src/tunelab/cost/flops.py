"""Model FLOPs: operations of training and inference by the formula that papers compare by.

Counted are the matrix products a model *needs*, a multiply-add being 2: "model FLOPs" in the sense of Chowdhery et
al. 2022 (PaLM), appendix B. Recomputation (gradient checkpointing, chunked logits), norms, activations and the
optimizer are not counted, nor are products an implementation computes and masks away.

For a product of an (m, k) by a (k, n) matrix the forward pass takes 2mkn and the backward pass twice that, once
for each operand's gradient. So, for one forward pass:

    linear layers     2 · N_b · T           every weight of a block meets every token once
    logits            2 · V · D · S         only loss positions are projected
    attention         4 · width · L · A     a (query, key) pair costs width multiply-adds in QKᵀ and as many in PV

and three times as much for training every weight. This differs from PaLM's 6N + 12·L·H·Q·T a token only in counting
the pairs and positions that are needed instead of all T² and T. What can be left out beyond that is in `floor.py`.
"""

from __future__ import annotations

from tunelab.cost.shape import ModelShape
from tunelab.types import Batch

BACKWARD_TO_FORWARD = 2
"""Two gradients a product: that of the input, that of the weight."""


def attention_pairs(batch: Batch) -> int:
    """(query, key) pairs of a packed row: causal within each segment, and every token with all of its prefix."""
    total = 0
    for segment in batch.segments:
        length = segment.stop - segment.start
        total += length * (length + 1) // 2 + length * segment.prefix_length
    return total


def inference_flops(shape: ModelShape, tokens: int, loss_positions: int, attention_pairs: int) -> int:
    """FLOPs of one forward pass over `tokens` T, projecting `loss_positions` S of them onto the vocabulary."""
    linear = 2 * shape.block_matmul_parameters * tokens
    logits = 2 * shape.vocab_size * shape.hidden_size * loss_positions
    attention = 4 * shape.attention_width * shape.num_layers * attention_pairs
    return linear + logits + attention


def training_flops(shape: ModelShape, tokens: int, loss_positions: int, attention_pairs: int) -> int:
    """FLOPs of forward and backward pass when every weight is trained.

    A reference model's pass is not included: add its `inference_flops` where one is made.
    """
    return (1 + BACKWARD_TO_FORWARD) * inference_flops(shape, tokens, loss_positions, attention_pairs)


def classic_training_flops(num_parameters: int, tokens: int) -> int:
    """6·N·D, the rule of thumb of Kaplan et al. 2020, "Scaling Laws for Neural Language Models", sec. 2.1.

    `num_parameters` is without embeddings. It leaves out attention and logits.
    """
    return 6 * num_parameters * tokens
