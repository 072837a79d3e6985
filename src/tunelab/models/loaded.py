"""A model ready to use, with all that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunelab.parallel import Precision


@dataclass
class LoadedModel:
    """A causal language model on its device, and its tokenizer.

    `source` is the name as the recipe gave it. `original_dropout` holds the dropout values the model came with, by
    key path in its config; a saved model gets them back. `layout` and `layout_reason` are set by the engine, which
    finds out whether the model can take packed rows.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    device: torch.device
    precision: Precision
    original_dropout: Mapping[str, float] = field(default_factory=dict)
    layout: Literal["packed", "padded"] = "padded"
    layout_reason: str = ""

    @property
    def context_length(self) -> int | None:
        """Positions the model has, or None where its config names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())
