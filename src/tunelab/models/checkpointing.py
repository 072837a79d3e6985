"""Activation (gradient) checkpointing: keep each block's input only, recompute the rest in backward."""

from __future__ import annotations

from transformers import PreTrainedModel

from tunelab.errors import ConfigError


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Trade one more forward pass for activations of one block instead of all.

    Non-reentrant, so that keyword arguments (the packed segments) and frozen inputs work. Raises ConfigError where the
    architecture does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"training.gradient_checkpointing: {type(model).__name__} does not support it; set it to false"
        )
    # transformers renamed the method in 5.2x; both spellings are public, one a release.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether `enable_checkpointing` was called on `model` and it is being trained.

    transformers' own property for this changed its name with the method above; the attribute is the same in both.
    """
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
