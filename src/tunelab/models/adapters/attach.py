"""An adapter put on a model, switched off, merged into it."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from tunelab.config.adapters import AdapterConfig, LoRAConfig, PartialConfig
from tunelab.models.adapters import pissa
from tunelab.models.adapters.kinds import peft_config
from tunelab.models.adapters.partial import freeze
from tunelab.models.adapters.virtual import VirtualConfig, initialise
from tunelab.models.loaded import LoadedModel
from tunelab.models.quantised import dequantise, is_quantised

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger("tunelab.models")

ADAPTER_NAME = "default"

ADAPTER_DTYPE = torch.float32
"""Of an adapter's weights, whatever the base's: bf16 would round away an update of less than 2⁻⁸ of a weight."""


def attach_adapter(loaded: LoadedModel, config: AdapterConfig, seed: int) -> None:
    """Put a new adapter on `loaded`; afterwards only its parameters (or the part `config` names) require gradients.

    Its initial values are a function of `seed` alone (the global generator is not touched), of ADAPTER_DTYPE (to which
    peft casts half precision) and, for PiSSA, of the weights. The model computes what it did before: to the bit, with
    PiSSA to rounding in the weights' type, with virtual tokens not at all. Raises ConfigError for what the model's
    layers cannot take.
    """
    if isinstance(config, PartialConfig):
        freeze(loaded.model, config)
        return
    loaded.adapter = wrap(loaded.model, peft_config(loaded.model, config), seed)
    if isinstance(config, LoRAConfig) and pissa.is_pissa(config.init_lora_weights):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pissa.move_directions(loaded.model, ADAPTER_NAME, str(config.init_lora_weights))
    saved = loaded.adapter.peft_config[ADAPTER_NAME]
    saved.base_model_name_or_path, saved.revision = loaded.origin, loaded.revision
    if isinstance(config, VirtualConfig):
        initialise(loaded, config)
    loaded.model.eval()


def adapt_skeleton(skeleton: PreTrainedModel, config: AdapterConfig) -> None:
    """The same for a model on the `meta` device, whose shapes and counts are then the adapted one's.

    What makes virtual tokens becomes a module of the skeleton, `prompt_encoder`, so that it is counted. For forecasts
    and checks before weights are read. Raises ConfigError as `attach_adapter`.
    """
    if isinstance(config, PartialConfig):
        freeze(skeleton, config)
    else:
        adapter = wrap(skeleton, peft_config(skeleton, config), seed=0)
        if isinstance(config, VirtualConfig):
            skeleton.add_module("prompt_encoder", adapter.prompt_encoder[ADAPTER_NAME])


def learning_rate_scales(model: nn.Module, config: AdapterConfig | None) -> dict[str, float]:
    """LoRA+ (Hayou et al. 2024): by parameter name, how many times the learning rate it learns at; others at once it.

    B and every vector, as in peft's `create_loraplus_optimizer`.
    """
    if not isinstance(config, LoRAConfig) or config.loraplus_lr_ratio is None:
        return {}
    return {
        name: config.loraplus_lr_ratio
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (".lora_B." in name or parameter.ndim == 1)
    }


def adapter_disabled(loaded: LoadedModel) -> AbstractContextManager[None]:
    """Inside, `loaded` computes what it did before it was trained; without an adapter this changes nothing.

    That is the adapter switched off, except for PiSSA, whose residual weights alone are no model (see `pissa.py`).
    """
    if loaded.adapter is None:
        return nullcontext()
    if pissa.has_pissa(loaded.model):
        return pissa.as_started(loaded.model, ADAPTER_NAME)
    disabled: AbstractContextManager[None] = loaded.adapter.disable_adapter()
    return disabled


def can_merge(loaded: LoadedModel) -> bool:
    """Whether the adapter is one of the weights, and not of the tokens before a sequence."""
    assert loaded.adapter is not None
    return not loaded.adapter.peft_config[ADAPTER_NAME].is_prompt_learning


def merge_adapter(loaded: LoadedModel, dtype: torch.dtype | None = None) -> None:
    """Put the adapter into the weights it stands beside (W + s·B·A, for instance) and forget it: a plain model, every
    weight trainable.

    Exact to rounding in the weights' type (about 1e-6 of a logit in float32; bf16 weights lose what is below 2⁻⁸ of
    their size), which is `dtype` afterwards if given. A quantised base is dequantised first, as a whole: packing the
    sum again would change it more. The layers become the plain ones again, so the engine has to be asked anew
    (`choose_layout`).
    """
    assert loaded.adapter is not None
    assert can_merge(loaded)
    if is_quantised(loaded.model):
        _onto_dense_weights(loaded)
    if dtype is not None:
        loaded.model.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        loaded.adapter.merge_and_unload(progressbar=False)
    loaded.adapter = None
    loaded.model.requires_grad_(True)


def _onto_dense_weights(loaded: LoadedModel) -> None:
    """The same adapter on the dequantised base: peft's merge into packed weights would pack them again, and rounds."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    assert loaded.adapter is not None
    config = loaded.adapter.peft_config[ADAPTER_NAME]
    tensors = get_peft_model_state_dict(loaded.adapter, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    dequantise(loaded.model)
    loaded.adapter.unload()
    config.base_model_name_or_path = None  # peft warns that it is renamed
    loaded.adapter = wrap(loaded.model, config, seed=0)
    set_peft_model_state_dict(loaded.adapter, tensors, adapter_name=ADAPTER_NAME)


def wrap(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """peft's wrapper around `model`, whose layers it replaces. peft draws initial values on the CPU.

    Raises ValueError where peft finds none of the layers that `config` names.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, at names that peft still uses
        torch.manual_seed(seed)
        adapter = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    return adapter
