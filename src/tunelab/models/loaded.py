"""A model ready to use, with all that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunelab.models.quantised import count_parameters
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
    `model`, whose layers it replaced or before whose sequences it puts virtual tokens; then only the adapter's
    parameters are trained. `neftune_noise_alpha`: of the noise on token embeddings while training (`noise.py`).
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
    neftune_noise_alpha: float | None = None

    @property
    def prompt_encoder(self) -> Any:
        """The module whose output virtual tokens are (peft's `PrefixEncoder` and its kin), None without such tokens.

        It is no part of `model`.
        """
        if self.adapter is None or not self.adapter.active_peft_config.is_prompt_learning:
            return None
        (encoder,) = self.adapter.prompt_encoder.values()
        return encoder

    @property
    def num_virtual_tokens(self) -> int:
        """What the adapter puts before every sequence."""
        if self.adapter is None or self.prompt_encoder is None:
            return 0
        count: int = self.adapter.active_peft_config.num_virtual_tokens
        return count

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter, tied ones once: the model's, its adapter's layers included, then a prompt encoder's."""
        yield from self.model.named_parameters()
        encoder = self.prompt_encoder
        if encoder is not None:
            yield from encoder.named_parameters(prefix="prompt_encoder")

    @property
    def context_length(self) -> int | None:
        """Positions the model has for tokens (virtual ones are taken off), or None where its config names no limit."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None else positions - self.num_virtual_tokens

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones counted once, quantised ones for what they stand for, an adapter's included."""
        return count_parameters(parameter for _, parameter in self.named_parameters())

    @property
    def num_trainable_parameters(self) -> int:
        """Parameters that training changes: an adapter's, or all."""
        return sum(parameter.numel() for _, parameter in self.named_parameters() if parameter.requires_grad)
