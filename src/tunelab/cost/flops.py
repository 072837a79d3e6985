"""Floating-point operations of training and inference, by formula.

Counted are the matrix products a model *needs*, a multiply-add being 2: "model FLOPs" in the sense of Chowdhery et
al. 2022 (PaLM), appendix B. Recomputation (gradient checkpointing, chunked logits), norms, activations and the
optimizer are not counted, nor are products an implementation computes and masks away.

For a product of an (m, k) by a (k, n) matrix the forward pass takes 2mkn and the backward pass twice that, once
for each operand's gradient. So, for one forward pass:

    linear layers     2 · N_b · T           every weight of a block meets every token once
    logits            2 · V · D · S         only loss positions are projected
    attention         4 · width · L · A     a (query, key) pair costs width multiply-adds in QKᵀ and as many in PV

and three times as much for training every weight. This differs from PaLM's 6N + 12·L·H·Q·T a token only in counting
the pairs and positions that are needed instead of all T² and T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tunelab.types import Batch

BACKWARD_TO_FORWARD = 2
"""Two gradients a product: that of the input, that of the weight."""


@dataclass(frozen=True)
class ModelShape:
    """What the formulas need to know of a decoder-only transformer.

    num_layers: L. hidden_size: D. vocab_size: V, the rows of the output projection.
    block_matmul_parameters: N_b, weights of all blocks' linear layers (12·L·D² for GPT-2).
    attention_width: query heads × head size.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    block_matmul_parameters: int
    attention_width: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelShape:
        """Read from a Hugging Face causal LM.

        Block weights are the two-dimensional `weight`s inside the list of decoder layers, which finds nn.Linear and
        GPT-2's Conv1D and leaves out embeddings and the output projection.
        """
        config: Any = model.config
        output: Any = model.get_output_embeddings()  # type: ignore[operator]
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        vocab_size, hidden_size = output.weight.shape
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            block_matmul_parameters=_matmul_parameters(_decoder_layers(model, config.num_hidden_layers)),
            attention_width=config.num_attention_heads * head_size,
        )


def _decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers)


def _matmul_parameters(layers: nn.ModuleList) -> int:
    weights = (getattr(module, "weight", None) for module in layers.modules())
    return sum(w.numel() for w in weights if isinstance(w, nn.Parameter) and w.ndim == 2)


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
