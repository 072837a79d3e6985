"""Adapters whose parameters make virtual tokens: prefix tuning, prompt tuning, P-tuning and P-tuning v2, as peft's.

peft's wrapper holds a prompt encoder; the model below keeps its modules and weights. What the encoder makes is handed
to the engine with each forward pass (`virtual_tokens`), so the engine's layouts and fused blocks stay as they are.

peft saves what the encoder computes, not its parameters. Where those are another thing (an MLP or LSTM that is thrown
away after training), a checkpoint has them in a file of their own beside peft's: training goes on from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tunelab.config.adapters import PrefixTuningConfig, PromptTuningConfig, PTuningConfig, PTuningV2Config
from tunelab.errors import ConfigError
from tunelab.manifest import PROMPT_ENCODER
from tunelab.models.loaded import LoadedModel
from tunelab.models.virtual_rows import VirtualTokens

if TYPE_CHECKING:
    from peft import PromptLearningConfig

VirtualConfig = PrefixTuningConfig | PTuningV2Config | PromptTuningConfig | PTuningConfig

_TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def prompt_config(model: PreTrainedModel, config: VirtualConfig) -> PromptLearningConfig:
    """peft's configuration of `config`. Raises ConfigError where `model` has no keys and values to put some before."""
    from peft import PrefixTuningConfig as PeftPrefix
    from peft import PromptEncoderConfig
    from peft import PromptTuningConfig as PeftPrompt

    count = config.num_virtual_tokens
    # peft looks for this number under some names only, and asks for it where embeddings have no use for it.
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None) or 1
    match config:
        case PromptTuningConfig():
            # Its own initialisation from text reads a tokenizer from disk or the hub; ours comes after (`initialise`).
            kind = "SAMPLE_VOCAB" if config.prompt_tuning_init == "sample_vocab" else "RANDOM"
            return PeftPrompt(num_virtual_tokens=count, prompt_tuning_init=kind, num_attention_heads=heads, **_TASK)
        case PTuningConfig():
            return PromptEncoderConfig(
                num_virtual_tokens=count,
                num_attention_heads=heads,
                encoder_reparameterization_type=config.encoder_reparameterization_type.upper(),
                encoder_hidden_size=config.encoder_hidden_size,
                encoder_num_layers=config.encoder_num_layers,
                encoder_dropout=config.encoder_dropout,
                **_TASK,
            )
        case PrefixTuningConfig():
            _check_uniform(model, config.name)
            hidden = config.encoder_hidden_size or model.config.get_text_config().hidden_size
            projected: dict[str, Any] = {"encoder_hidden_size": hidden} if config.prefix_projection else {}
            return PeftPrefix(
                num_virtual_tokens=count,
                num_attention_heads=heads,
                prefix_projection=config.prefix_projection,
                **projected,
                **_TASK,
            )
        case PTuningV2Config():
            _check_uniform(model, config.name)
            return PeftPrefix(num_virtual_tokens=count, num_attention_heads=heads, prefix_projection=False, **_TASK)


def _check_uniform(model: PreTrainedModel, name: str) -> None:
    """Keys and values of one shape in every layer, and layers that have any: else peft leaves layers out."""
    config = model.config.get_text_config()
    if not getattr(config, "num_attention_heads", None):
        raise ConfigError(f"adapter.name: {name} needs attention, and {type(model).__name__} has none; use lora")
    described = config.to_dict()  # whose per_layer_config has the layers that differ, where the attribute has all
    if described.get("per_layer_config") or described.get("num_kv_shared_layers"):
        raise ConfigError(
            f"adapter.name: {name} needs keys of one shape in every layer, and those of {type(model).__name__} "
            "differ; use prompt_tuning or lora"
        )


def initialise(loaded: LoadedModel, config: VirtualConfig) -> None:
    """Start a prompt from the embeddings of a text, where `config` says so; other kinds start as peft makes them.

    Raises ConfigError if the text has no token.
    """
    if not isinstance(config, PromptTuningConfig) or config.prompt_tuning_init_text is None:
        return
    ids = loaded.tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError("adapter.prompt_tuning_init_text: the tokenizer makes no token of it; give some words")
    count = config.num_virtual_tokens
    ids = (ids * -(-count // len(ids)))[:count]  # repeated or cut, as peft's PromptEmbedding does
    embedding, encoder = loaded.model.get_input_embeddings(), loaded.prompt_encoder
    assert encoder is not None
    with torch.no_grad():
        encoder.embedding.weight.copy_(embedding(torch.tensor(ids, device=loaded.device)))
    saved: Any = _saved_config(loaded)
    saved.prompt_tuning_init, saved.prompt_tuning_init_text = "TEXT", config.prompt_tuning_init_text
    saved.tokenizer_name_or_path = loaded.origin


def virtual_tokens(loaded: LoadedModel) -> VirtualTokens | None:
    """What the adapter of `loaded` puts before every sequence now, differentiable in its parameters; None where it is
    of another kind, or switched off.

    In float32 (with autocast off), the encoder in the mode that the model is in.
    """
    encoder = loaded.prompt_encoder
    if encoder is None or loaded.adapter is None or not loaded.adapter.has_active_enabled_adapter:
        return None
    encoder.train(loaded.model.training)
    config: Any = _saved_config(loaded)
    with torch.autocast(loaded.device.type, enabled=False):
        if config.inference_mode:  # the encoder's output alone, as it was saved
            found = encoder.embedding.weight
        else:
            found = encoder(torch.arange(config.num_virtual_tokens, device=loaded.device)[None])[0]
    if _type_of(config) != "PREFIX_TUNING":
        return VirtualTokens(embeddings=found)
    # (V, 2L·H_kv·K), keys before values in each layer: peft's PeftModel.get_prompt.
    return VirtualTokens(
        keys_values=found.unflatten(1, (config.num_layers, 2, config.num_attention_heads, -1)).permute(1, 2, 0, 3, 4)
    )


def save_encoder(loaded: LoadedModel, folder: Path) -> None:
    """Write the encoder's own parameters, where peft's file has only what they compute, so that training can go on."""
    encoder = loaded.prompt_encoder
    if encoder is not None and _reparametrised(_saved_config(loaded)) and not _saved_config(loaded).inference_mode:
        tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
        save_file(tensors, folder / PROMPT_ENCODER, metadata={"format": "pt"})


@contextmanager
def evaluated(loaded: LoadedModel) -> Iterator[None]:
    """Within the body a prompt encoder, if any, is in evaluation mode: what is saved is computed without dropout."""
    encoder = loaded.prompt_encoder
    was_training = encoder is not None and encoder.training
    if was_training:
        encoder.eval()
    yield
    if was_training:
        encoder.train()


@contextmanager
def without_text(config: Any) -> Iterator[None]:
    """Within the body peft does not look for the tokenizer of a prompt's first text, which is about to be replaced."""
    before = getattr(config, "prompt_tuning_init", None)
    if before is not None:
        config.prompt_tuning_init = "RANDOM"
    yield
    if before is not None:
        config.prompt_tuning_init = before


def load_encoder(loaded: LoadedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put what was saved in `folder` into the new prompt encoder of `loaded`. `tensors`: those of peft's file.

    To be trained on (not `inference_mode`), a reparametrised prompt needs the encoder's own parameters. Raises
    ConfigError where they are missing, damaged or of other shapes.
    """
    encoder, config = loaded.prompt_encoder, _saved_config(loaded)
    names = {"prompt_embeddings": "embedding.weight"}
    if not config.inference_mode and _reparametrised(config):
        tensors = _read_encoder(folder)
        names = {name: name for name in encoder.state_dict()}
    expected = {name: encoder.state_dict()[own] for name, own in names.items()}
    shapes = [{name: list(t.shape) for name, t in found.items()} for found in (tensors, expected)]
    wrong = sorted(name for name in {*tensors, *expected} if shapes[0].get(name) != shapes[1].get(name))
    if wrong:
        found, wanted = (f"of shape {s[wrong[0]]}" if wrong[0] in s else "missing" for s in shapes)
        raise ConfigError(
            f"model.name: {folder}: does not fit its base model {config.base_model_name_or_path}: {wrong[0]} is "
            f"{found} in the file and {wanted} in the model"
        )
    encoder.load_state_dict({names[name]: tensor for name, tensor in tensors.items()}, strict=True)
    if config.inference_mode:
        encoder.requires_grad_(False).eval()


def _read_encoder(folder: Path) -> dict[str, Tensor]:
    file = folder / PROMPT_ENCODER
    if not file.is_file():
        raise ConfigError(
            f"model.name: {folder}: training cannot go on from it: peft's file holds what the prompt encoder computed, "
            f"and {PROMPT_ENCODER}, its parameters, is missing; resume from a checkpoint of the run"
        )
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.name: {file} is damaged ({error}); copy it again") from error


def _reparametrised(config: Any) -> bool:
    """Whether the virtual tokens are computed from other parameters."""
    return _type_of(config) == "P_TUNING" or bool(getattr(config, "prefix_projection", False))


def _type_of(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _saved_config(loaded: LoadedModel) -> Any:
    assert loaded.adapter is not None
    return loaded.adapter.active_peft_config
