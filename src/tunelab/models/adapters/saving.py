"""An adapter on disk, as peft writes and reads it; and what lies below it."""

from __future__ import annotations

import copy
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tunelab.errors import ConfigError
from tunelab.manifest import ADAPTER_WEIGHTS
from tunelab.models.adapters.attach import ADAPTER_NAME, wrap
from tunelab.models.loaded import LoadedModel


def save_adapter(loaded: LoadedModel, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json into `folder`, as `PeftModel.save_pretrained` does.

    Without its model card, without its look-up of the base model on the hub, and with the layers' names in a fixed
    order. Stock peft opens it.
    """
    from peft import get_peft_model_state_dict

    assert loaded.adapter is not None
    tensors = get_peft_model_state_dict(loaded.adapter, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"}
    )
    config = copy.copy(loaded.adapter.peft_config[ADAPTER_NAME])
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def load_adapter(loaded: LoadedModel, folder: Path) -> None:
    """Put the adapter saved in `folder` on `loaded`, its base, ready to be trained on.

    Raises ConfigError if it is of a kind that is not supported, damaged, or made for another model.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    where = f"model.name: {folder}"
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{where}: the adapter cannot be read ({_first_line(error)}); copy it again") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ConfigError(f"{where}: an adapter of type {kind}, and only LORA is supported; merge it with peft first")
    base, config.base_model_name_or_path = config.base_model_name_or_path, None  # peft warns that it is renamed
    config.inference_mode = False
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
    set_peft_model_state_dict(adapter, tensors, adapter_name=ADAPTER_NAME)
    loaded.adapter = adapter
    loaded.model.eval()


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
