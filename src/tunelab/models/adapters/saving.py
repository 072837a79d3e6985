"""An adapter on disk, as peft writes and reads it; and what lies below it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tunelab.errors import ConfigError
from tunelab.manifest import ADAPTER_WEIGHTS
from tunelab.models.adapters import pissa, virtual
from tunelab.models.adapters.attach import ADAPTER_NAME, wrap
from tunelab.models.loaded import LoadedModel

KINDS = ("LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
"""peft's names of the kinds that can be opened."""

_MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the weights below. What they took cannot be told from the adapter alone."""


def save_adapter(loaded: LoadedModel, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json into `folder`, as `PeftModel.save_pretrained` does.

    Without its model card, without its look-up of the base model on the hub, and with the layers' names in a fixed
    order. Stock peft opens it on the original weights; PiSSA's is a LoRA of twice its rank there (see `pissa.py`).
    """
    assert loaded.adapter is not None
    tensors = adapter_tensors(loaded)
    virtual.save_encoder(loaded, folder)
    config = copy.copy(loaded.adapter.peft_config[ADAPTER_NAME])
    if pissa.has_pissa(loaded.model):
        tensors, config = pissa.to_lora(loaded.model, tensors, config, folder)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"}
    )
    config.inference_mode = True
    for names in ("target_modules", "feedforward_modules"):
        if isinstance(getattr(config, names, None), set):
            setattr(config, names, sorted(getattr(config, names)))
    config.save_pretrained(str(folder))


def adapter_tensors(loaded: LoadedModel) -> dict[str, Tensor]:
    """The adapter's tensors under the names they are saved by."""
    from peft import get_peft_model_state_dict

    with virtual.evaluated(loaded):
        found: dict[str, Tensor] = get_peft_model_state_dict(
            loaded.adapter, adapter_name=ADAPTER_NAME, save_embedding_layers=False
        )
    # peft counts everything in an adapter's layer as the adapter's.
    return {name: tensor for name, tensor in found.items() if not name.endswith(pissa.INITIAL)}


def load_adapter(loaded: LoadedModel, folder: Path, trainable: bool = True) -> None:
    """Put the adapter saved in `folder` on `loaded`, its base, ready to be trained on.

    Not `trainable`, virtual tokens are what peft's file has of them, computed, and PiSSA's is a LoRA. Raises
    ConfigError if it is of a kind that is not supported, damaged, or made for another model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    where = f"model.name: {folder}"
    config, tensors = _read(folder, where)
    base, config.base_model_name_or_path = config.base_model_name_or_path, None  # peft warns that it is renamed
    config.inference_mode = False
    if config.is_prompt_learning:
        config.inference_mode = not trainable
        with virtual.without_text(config):
            loaded.adapter = wrap(loaded.model, config, seed=0)
        config.base_model_name_or_path = base
        virtual.load_encoder(loaded, tensors, folder)
        loaded.model.eval()
        return
    initial: dict[str, Tensor] = {}
    if trainable:
        tensors, config, initial = pissa.from_lora(tensors, config, folder)
    try:
        adapter = wrap(loaded.model, config, seed=0)
    except ValueError as error:  # none of its layers is there
        raise ConfigError(f"{where}: does not fit its base model {base} ({_first_line(error)})") from error
    adapter.peft_config[ADAPTER_NAME].base_model_name_or_path = base
    expected = get_peft_model_state_dict(adapter, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    wrong = {name for name in {*tensors, *expected} if _shape(tensors, name) != _shape(expected, name)}
    if wrong:
        name = min(wrong)
        raise ConfigError(
            f"{where}: does not fit its base model {base}: {name} is {_shape(tensors, name)} in the file and "
            f"{_shape(expected, name)} in the model ({len(wrong)} such)"
        )
    pissa.restore_rest(loaded.model, ADAPTER_NAME, initial)
    set_peft_model_state_dict(adapter, tensors, adapter_name=ADAPTER_NAME)
    loaded.adapter = adapter
    loaded.model.eval()


def _read(folder: Path, where: str) -> tuple[Any, dict[str, Tensor]]:
    """peft's configuration and the tensors. Raises ConfigError."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{where}: the adapter cannot be read ({_first_line(error)}); copy it again") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in KINDS:
        raise ConfigError(
            f"{where}: an adapter of type {kind}, and only {', '.join(KINDS)} are supported; merge it with peft first"
        )
    if str(getattr(config, "init_lora_weights", "")).startswith(_MOVES_WEIGHTS):
        raise ConfigError(
            f"{where}: its adapter stands on other weights than its base model's (init_lora_weights: "
            f"{config.init_lora_weights}); write it with peft's path_initial_model_for_weight_conversion, or merge it"
        )
    return config, tensors


def base_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of `model` without its adapter, under the names the tensors have without it."""
    if not hasattr(model, "peft_config"):  # which peft puts on a model it adapts; importing it takes a second
        return dict(model.state_dict())
    from peft.tuners.tuners_utils import BaseTunerLayer

    tensors: dict[str, Tensor] = dict(model.state_dict())
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        added = tuple(f"{path}.{name}." for name in module.adapter_layer_names)
        tensors = {
            name.replace(f"{path}.base_layer.", f"{path}.", 1): tensor
            for name, tensor in tensors.items()
            if not name.startswith(added)
        }
    return tensors


def _shape(tensors: dict[str, Tensor], name: str) -> str:
    return f"of shape {list(tensors[name].shape)}" if name in tensors else "missing"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
