"""An adapter put on a model, switched off, merged into it."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from tunelab.config import AdapterConfig
from tunelab.models.adapters.kinds import peft_config
from tunelab.models.loaded import LoadedModel

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

ADAPTER_NAME = "default"

ADAPTER_DTYPE = torch.float32
"""Of an adapter's weights, whatever the base's: bf16 would round away an update of less than 2⁻⁸ of a weight."""


def attach_adapter(loaded: LoadedModel, config: AdapterConfig, seed: int) -> None:
    """Put a new adapter on `loaded`; afterwards only its parameters require gradients.

    Its initial values are a function of `seed` alone (the global generator is not touched), of ADAPTER_DTYPE (to which
    peft casts half precision). The model computes what it did before. Raises ConfigError if `target_modules` names no
    linear layer.
    """
    loaded.adapter = wrap(loaded.model, peft_config(loaded.model, config), seed)
    saved = loaded.adapter.peft_config[ADAPTER_NAME]
    saved.base_model_name_or_path, saved.revision = loaded.origin, loaded.revision
    loaded.model.eval()


def adapt_skeleton(skeleton: PreTrainedModel, config: AdapterConfig) -> None:
    """The same for a model on the `meta` device, whose shapes and counts are then the adapted one's.

    For forecasts and checks before weights are read. Raises ConfigError as `attach_adapter`.
    """
    wrap(skeleton, peft_config(skeleton, config), seed=0)


def adapter_disabled(loaded: LoadedModel) -> AbstractContextManager[None]:
    """Inside, `loaded` computes what it did before the adapter; without an adapter this changes nothing."""
    if loaded.adapter is None:
        return nullcontext()
    disabled: AbstractContextManager[None] = loaded.adapter.disable_adapter()
    return disabled


def merge_adapter(loaded: LoadedModel) -> None:
    """Add the adapter to the weights it stands beside (W + s·B·A) and forget it: a plain model, every weight trainable.

    Exact to rounding in the weights' type: about 1e-6 of a logit in float32; bf16 weights lose what is below 2⁻⁸ of
    their size. The layers become the plain ones again, so the engine has to be asked anew (`choose_layout`).
    """
    assert loaded.adapter is not None
    loaded.adapter.merge_and_unload(progressbar=False)
    loaded.adapter = None
    loaded.model.requires_grad_(True)


def wrap(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """peft's wrapper around `model`, whose layers it replaces. peft draws initial values on the CPU."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, at names that peft still uses
        torch.manual_seed(seed)
        return get_peft_model(model, config, adapter_name=ADAPTER_NAME)
