"""Dropout of a model, whatever its architecture calls it: set in the config before the model is built from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import PreTrainedConfig


def read_dropout(config: PreTrainedConfig) -> dict[str, float]:
    """Every dropout probability of `config`, nested configs included, by key path."""
    return {path: float(getattr(owner, name)) for path, owner, name in _dropout_fields(config)}


def set_dropout(config: PreTrainedConfig, probability: float) -> dict[str, float]:
    """Set every dropout probability of `config` and return those it had, as `read_dropout` does.

    Whole layers dropped (`layerdrop`, OPT) are another thing and are switched off: a skipped block would not be
    dropout at all.
    """
    original = read_dropout(config)
    for _, owner, name in _dropout_fields(config):
        setattr(owner, name, 0.0 if name == "layerdrop" else probability)
    return original


def restore_dropout(config: PreTrainedConfig, original: Mapping[str, float]) -> None:
    """Put back probabilities by key path, as `read_dropout` and `set_dropout` return them."""
    for path, owner, name in _dropout_fields(config):
        if path in original:
            setattr(owner, name, original[path])


def _dropout_fields(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, PreTrainedConfig, str]]:
    """(key path, the config that holds it, attribute name) of every dropout probability.

    Names in transformers: dropout, attention_dropout, hidden_dropout_prob, resid_pdrop, emb_pdrop, layerdrop… A field
    that is None (classifier_dropout) is unset, and a bool is no probability.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield from _dropout_fields(value, f"{prefix}{name}.")
        elif _is_dropout(name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", config, name


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith("pdrop") or name == "layerdrop"
