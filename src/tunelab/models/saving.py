"""Writing a model as a plain transformers folder, and knowing weights by their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunelab.models.adapters import adapter_tensors, base_tensors, save_adapter
from tunelab.models.dropout import read_dropout, restore_dropout
from tunelab.models.loaded import LoadedModel
from tunelab.models.quiet import quiet_transformers

ONE_FILE = "1000TB"
"""No sharding: a checkpoint's manifest, a copy and `load_model` all deal with one model.safetensors."""


def save_model(loaded: LoadedModel, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer files and chat template into `folder`.

    Of a model with an adapter only that is written, in the place of weights and configs, and stock peft opens it. Else
    stock transformers opens the folder, and computes the same logits: the config has the dropout the model came with;
    the attention implementation is no part of a saved config; tied weights are written once. The files are written in
    place: whoever needs all or nothing writes into a temporary folder and renames it.
    """
    with quiet_transformers(), _original_dropout(loaded):
        if loaded.adapter is not None:
            save_adapter(loaded, folder)
        else:
            loaded.model.save_pretrained(folder, max_shard_size=ONE_FILE)
        loaded.tokenizer.save_pretrained(folder)


@contextmanager
def _original_dropout(loaded: LoadedModel) -> Iterator[None]:
    """The config as it came while it is written, the run's own afterwards."""
    config = loaded.model.config
    current = read_dropout(config)
    restore_dropout(config, loaded.original_dropout)
    try:
        yield
    finally:
        restore_dropout(config, current)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over every tensor of the state dict, by name: name, dtype, shape, bytes. The same on every device.

    An adapter is left out: a model has the same fingerprint with it and without.
    """
    return _fingerprint(base_tensors(model))


def adapter_fingerprint(loaded: LoadedModel) -> str:
    """The same over what an adapter adds, and what it is; empty without one."""
    if loaded.adapter is None:
        return ""
    described = json.dumps(loaded.adapter.active_peft_config.to_dict(), default=_in_order, sort_keys=True)
    return _fingerprint(adapter_tensors(loaded)) + described


def _in_order(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1).contiguous().cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
