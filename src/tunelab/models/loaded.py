"""A model ready to use, with all that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunelab.models.shortcuts import OWN_MODULES, Shortcuts
from tunelab.parallel import Precision

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class LoadedModel:
    """A causal language model on its device, and its tokenizer.

    `source` is the name as the recipe gave it; `origin` says where the weights lie in words that hold from elsewhere
    (a hub or built-in name, else an absolute path), and `revision` which commit of a hub model they are.
    `original_dropout` holds the dropout values the model came with, by key path in its config; a saved model gets them
    back. `layout` and `layout_reason` are set by the engine, which finds out whether the model can take packed rows; so
    are `shortcuts`, and why its blocks are not fused where they are not. `adapter` is peft's wrapper around the same
    `model`, whose layers it replaced; then only the adapter's parameters are trained.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    device: torch.device
    precision: Precision
    original_dropout: Mapping[str, float] = field(default_factory=dict)
    layout: Literal["packed", "padded"] = "padded"
    layout_reason: str = ""
    shortcuts: Shortcuts = OWN_MODULES
    blocks_reason: str = ""
    origin: str = ""
    revision: str | None = None
    adapter: PeftModel | None = None

    @property
    def context_length(self) -> int | None:
        """Positions the model has, or None where its config names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones counted once, an adapter's included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_trainable_parameters(self) -> int:
        """Parameters that training changes: an adapter's, or all."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
