"""Adapters: a few new weights beside frozen ones, built, saved, loaded and merged with peft.

`LoadedModel.model` stays the transformers model: peft replaces its linear layers in place, so `base_model`, the output
head, generation and attention go on as before. `LoadedModel.adapter` is peft's wrapper around that same model, or None.
There is one adapter at a time, under peft's own name "default".

A new kind of adapter is one class in `config/schema.py` and one case in `_peft_config`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunelab.config import AdapterConfig
from tunelab.config.schema import TARGET_PRESETS
from tunelab.errors import ConfigError
from tunelab.manifest import ADAPTER_WEIGHTS
from tunelab.models.loaded import LoadedModel

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

ADAPTER_NAME = "default"

ADAPTER_DTYPE = torch.float32
"""Of an adapter's weights, whatever the base's: bf16 would round away an update of less than 2⁻⁸ of a weight."""

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|fc_?\d|moe|expert|intermediate|output", re.IGNORECASE)
_MOST_NAMES_SHOWN = 12


def attach_adapter(loaded: LoadedModel, config: AdapterConfig, seed: int) -> None:
    """Put a new adapter on `loaded`; afterwards only its parameters require gradients.

    Its initial values are a function of `seed` alone (the global generator is not touched), of ADAPTER_DTYPE (to which
    peft casts half precision). The model computes what it did before. Raises ConfigError if `target_modules` names no
    linear layer.
    """
    loaded.adapter = _wrap(loaded.model, _peft_config(loaded.model, config), seed)
    saved = loaded.adapter.peft_config[ADAPTER_NAME]
    saved.base_model_name_or_path, saved.revision = loaded.origin, loaded.revision
    loaded.model.eval()


def adapt_skeleton(skeleton: PreTrainedModel, config: AdapterConfig) -> None:
    """The same for a model on the `meta` device, whose shapes and counts are then the adapted one's.

    For forecasts and checks before weights are read. Raises ConfigError as `attach_adapter`.
    """
    _wrap(skeleton, _peft_config(skeleton, config), seed=0)


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
        adapter = _wrap(loaded.model, config, seed=0)
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


# --- which layers ---------------------------------------------------------------------------------------------------


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D of `model` by its full name, the output head left out."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def find_targets(model: PreTrainedModel, wanted: str | Iterable[str]) -> list[str]:
    """Full names of the layers that `adapter.target_modules` means in `model`.

    `wanted` is a preset, a regular expression for whole names, or names (the end of a full name, from a dot on).
    Raises ConfigError, listing what exists, for a preset, pattern or name without any layer.
    """
    layers = linear_layers(model)
    if not isinstance(wanted, str):
        for word in wanted:
            if not any(_ends_in(name, word) for name in layers):
                raise _no_such_layer(f"'{word}'", model, layers)
        return [name for name in layers if any(_ends_in(name, word) for word in wanted)]
    if wanted == "all-linear":
        found = list(layers)
    elif wanted == "attention":
        found = [name for name in layers if _ATTENTION.search(_within_block(name))]
    elif wanted == "mlp":
        inner = {name: _within_block(name) for name in layers}
        found = [name for name, path in inner.items() if _MLP.search(path) and not _ATTENTION.search(path)]
    else:
        found = [name for name in layers if re.fullmatch(wanted, name)]
    if not found:
        raise _no_such_layer(wanted if wanted in TARGET_PRESETS else f"the pattern '{wanted}'", model, layers)
    return found


def _ends_in(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _within_block(name: str) -> str:
    """`transformer.h.3.attn.c_attn` → `attn.c_attn`; empty for a layer outside the list of blocks."""
    block = re.search(r"\.\d+\.(.+)", name)
    return block[1] if block else ""


def _no_such_layer(what: str, model: PreTrainedModel, layers: Iterable[str]) -> ConfigError:
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    shown = ", ".join(names[:_MOST_NAMES_SHOWN]) + (", …" if len(names) > _MOST_NAMES_SHOWN else "")
    full = next(iter(layers), "")
    return ConfigError(
        f"adapter.target_modules: {what} matches no linear layer of {type(model).__name__} (its output head is not "
        f"adapted); there are {shown or 'none'}" + (f", in full e.g. {full}" if full else "")
    )


def _short_names(model: PreTrainedModel, chosen: list[str]) -> list[str]:
    """The shortest name endings that mean exactly `chosen` in `model`, for an adapter_config.json a person can read."""
    every = [name for name, _ in model.named_modules()]
    for parts in (1, 2):
        endings = sorted({".".join(name.split(".")[-parts:]) for name in chosen})
        if [name for name in every if any(_ends_in(name, ending) for ending in endings)] == chosen:
            return endings
    return chosen


# --- peft -----------------------------------------------------------------------------------------------------------


def _peft_config(model: PreTrainedModel, config: AdapterConfig) -> PeftConfig:
    from peft import LoraConfig

    targets = find_targets(model, config.target_modules)
    layers = linear_layers(model)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
        target_modules=_short_names(model, targets),
        fan_in_fan_out=any(
            isinstance(layers[name], Conv1D) for name in targets
        ),  # Conv1D keeps its weight as (in, out)
    )


def _wrap(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """peft's wrapper around `model`, whose layers it replaces. peft draws initial values on the CPU."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, at names that peft still uses
        torch.manual_seed(seed)
        return get_peft_model(model, config, adapter_name=ADAPTER_NAME)


def _shape(tensors: dict[str, Tensor], name: str) -> str:
    return f"of shape {list(tensors[name].shape)}" if name in tensors else "missing"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
