"""The packed layout: one row without padding through the model, log-probabilities at loss positions only."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunelab.models.attention import PACKED_ATTENTION, plain_attention, register_packed_attention
from tunelab.models.logprobs import token_logprobs
from tunelab.models.padded import padded_logprobs
from tunelab.types import Batch, Segment

PROBE_TOLERANCE = 1e-3
"""Largest difference in a log-probability between the layouts at which a model counts as packable (float32 models
differ by about 1e-5; a model that ignores segments differs by whole nats)."""


def packed_logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log p(target) at every loss position of a packed row: (S,) float32, differentiable.

    Only the decoder runs on the T tokens; hidden states are gathered at the S loss positions before the output head.
    """
    hidden = model.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        packed_segments=batch.segments,
    ).last_hidden_state[0]
    head = model.get_output_embeddings()
    return token_logprobs(
        hidden.index_select(0, batch.loss_positions), head.weight, batch.targets, getattr(head, "bias", None)
    )


def enable_packing(model: PreTrainedModel) -> str | None:
    """Switch `model` to packed attention if that computes what the plain model does; else say why not.

    The answer is found by trial, not by a list of architectures: a small row of three unequal sequences, one of them
    behind a shared prefix, goes through both layouts in evaluation mode and their log-probabilities are compared.
    Returns None if the model is now packed, else the reason, with the model as it was.
    """
    if model.get_output_embeddings() is None:
        return "the model has no output embeddings"
    register_packed_attention()
    batch = _probe_batch(model).to(model.device)
    before, was_training = model.config._attn_implementation, model.training
    model.eval()
    try:
        with torch.no_grad():
            with plain_attention(model):
                expected = padded_logprobs(model, batch)
            model.set_attn_implementation(PACKED_ATTENTION)
            found = packed_logprobs(model, batch)
        # Half-precision models round differently in the two layouts; what must not differ is the mathematics.
        tolerance = PROBE_TOLERANCE if model.dtype == torch.float32 else 0.25
        difference = (found - expected).abs().max().item()
        if difference <= tolerance:
            return None
        reason = f"its log-probabilities differ from the plain model's by {difference:.1e}"
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
    finally:
        model.train(was_training)
    model.set_attn_implementation(before)
    return reason


def _probe_batch(model: PreTrainedModel) -> Batch:
    """A prompt of 4 with completions of 3 and 5, and a lone sequence of 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_output_embeddings().weight.shape[0], (18,), generator=generator)
    segments = (Segment(0, 4), Segment(4, 7, 0, 4), Segment(7, 12, 0, 4), Segment(12, 18))
    positions = torch.tensor([*range(4), *range(4, 7), *range(4, 9), *range(6)])
    predictors = [3, 4, 5, 3, 7, 8, 9, 10, 12, 13, 14, 15, 16]
    targets = [4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17]
    sequences = [0] * 3 + [1] * 5 + [2] * 5
    return Batch(
        input_ids=ids,
        position_ids=positions,
        segments=segments,
        loss_positions=torch.tensor(predictors),
        targets=ids[torch.tensor(targets)],
        sequence_ids=torch.tensor(sequences),
        num_sequences=3,
        record_ids=(0, 1),
    )
