"""A tiny random model and packed rows of unequal lengths."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tunelab.models.engine import choose_layout
from tunelab.models.loaded import LoadedModel
from tunelab.models.tiny import build_tiny_tokenizer
from tunelab.parallel import resolve_precision


def build_tiny(seed: int = 0) -> LoadedModel:
    torch.manual_seed(seed)
    tokenizer: PreTrainedTokenizerFast = build_tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    device = torch.device("cpu")
    loaded = LoadedModel(GPT2LMHeadModel(config), tokenizer, "tiny", device, resolve_precision("float32", device))
    choose_layout(loaded, "packed", 128)
    return loaded


@pytest.fixture
def tiny() -> LoadedModel:
    return build_tiny()
