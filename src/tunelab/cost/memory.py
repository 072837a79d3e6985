"""The memory a training step needs at the least, term by term.

Activations are those of exact blocks that save each product's input once and recompute what is elementwise. A token
and block: the residual stream (D) at the block's start and at its middle, queries, keys and values (attention width +
2 × key-value width; after rotary embedding), attention's output (attention width) and log-sum-exp (one float32 a head),
and the MLP before its activation (4D in GPT-2; gate and up in Llama). Norms and activations are recomputed from these;
LoRA adds rank numbers an adapted product. In the last block only keys, values and the block's input exist at every
token, the rest at predictors. A block of unknown make counts its input and every product's output instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunelab.cost.shape import Block, ModelShape, Projection

LOGIT_BYTES = LOGSUMEXP_BYTES = 4
"""Float32 in every precision."""


@dataclass(frozen=True)
class MemoryFloor:
    """Bytes. `total` supposes that all stand at once, as they do at the start of a later micro-batch's backward pass;
    in a step of one micro-batch gradients appear as activations go, and an engine may stay a little beneath it.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def floor_memory(
    shape: ModelShape,
    *,
    parameters: int,
    trainable: int,
    tokens: int,
    predictors: int,
    chunk_size: int,
    weight_bytes: int = 4,
    trainable_bytes: int = 4,
    activation_bytes: int = 4,
    optimizer_slots: int = 2,
) -> MemoryFloor:
    """The memory floor of training, without the process itself (interpreter, libraries, a CUDA context).

    parameters: all, tied ones once, of which `trainable` have gradients and `optimizer_slots` numbers of optimizer
    state each (AdamW 2, momentum 1, SGD 0), all of `trainable_bytes`; frozen ones take `weight_bytes`. tokens T and
    predictors U (`predictor_counts`) of the largest micro-batch. chunk_size: rows of logits that exist at a time.
    """
    blocks = [_block_bytes(block, shape, tokens, tokens, activation_bytes) for block in shape.blocks[:-1]]
    last = _block_bytes(shape.blocks[-1], shape, tokens, predictors, activation_bytes)
    final = predictors * shape.hidden_size * activation_bytes
    return MemoryFloor(
        weights=(parameters - trainable) * weight_bytes + trainable * trainable_bytes,
        gradients=trainable * trainable_bytes,
        optimizer=trainable * optimizer_slots * trainable_bytes,
        activations=sum(blocks) + last + final,
        logits=min(chunk_size, predictors) * shape.vocab_size * LOGIT_BYTES,
    )


def _block_bytes(block: Block, shape: ModelShape, tokens: int, predictors: int, item: int) -> int:
    """Saved activations of a block whose queries, output and MLP run at `predictors` rows."""
    adapters = sum(p.rank * (tokens if _needs_every_token(p) else predictors) for p in block.projections)
    if not block.is_known:
        return (tokens * (shape.hidden_size + block.width("other")) + adapters) * item
    every = shape.hidden_size + block.width("key", "value")
    few = block.width("query") + shape.attention_width + shape.hidden_size + block.width("mlp_in")
    return (tokens * every + predictors * few + adapters) * item + predictors * shape.num_heads * LOGSUMEXP_BYTES


def _needs_every_token(projection: Projection) -> bool:
    return any(role in ("key", "value", "other") for role, _ in projection.outputs)
