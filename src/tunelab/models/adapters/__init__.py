"""Adapters: a few new weights beside frozen ones, built, saved, loaded and merged with peft.

`LoadedModel.model` stays the transformers model: peft replaces its linear layers in place, so `base_model`, the output
head, generation and attention go on as before. `LoadedModel.adapter` is peft's wrapper around that same model, or None.
There is one adapter at a time, under peft's own name "default".

A new kind of adapter is one class in `config/adapters.py` and one case in `kinds.py`.
"""

from tunelab.models.adapters.attach import (
    ADAPTER_DTYPE,
    ADAPTER_NAME,
    adapt_skeleton,
    adapter_disabled,
    attach_adapter,
    can_merge,
    learning_rate_scales,
    merge_adapter,
)
from tunelab.models.adapters.saving import adapter_tensors, base_tensors, load_adapter, save_adapter
from tunelab.models.adapters.targets import find_targets, linear_layers

__all__ = [
    "ADAPTER_DTYPE",
    "ADAPTER_NAME",
    "adapt_skeleton",
    "adapter_disabled",
    "adapter_tensors",
    "attach_adapter",
    "base_tensors",
    "can_merge",
    "find_targets",
    "learning_rate_scales",
    "linear_layers",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
]
