"""From `adapter` of a recipe to peft's configurations. A new kind is a case here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunelab.config import AdapterConfig
from tunelab.models.adapters.targets import find_targets, linear_layers, short_names

if TYPE_CHECKING:
    from peft import PeftConfig


def peft_config(model: PreTrainedModel, config: AdapterConfig) -> PeftConfig:
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
        target_modules=short_names(model, targets),
        fan_in_fan_out=any(
            isinstance(layers[name], Conv1D) for name in targets
        ),  # Conv1D keeps its weight as (in, out)
    )
