"""GGUF files (llama.cpp's format), dequantised through transformers into ordinary models and tokenizers."""

from __future__ import annotations

import logging
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunelab.errors import ConfigError
from tunelab.models.quiet import quiet_transformers

logger = logging.getLogger("tunelab.models")

DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Values of `tokenizer.ggml.pre` that llama.cpp splits at every digit, then by GPT-2's pattern
(llama.cpp `src/llama-vocab.cpp`, LLAMA_VOCAB_PRE_TYPE_SMOLLM and its siblings)."""

GPT2_PATTERN = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "roberta-bpe", "exaone4"})
"""Values of `tokenizer.ggml.pre` that are GPT-2's pattern alone, which is what transformers builds by default."""


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself: `architecture` (llama, gpt2…), tokenizer `model` and `pre`-tokenizer."""

    architecture: str
    tokenizer_model: str | None
    pre_tokenizer: str | None


def read_gguf_header(path: Path) -> GGUFHeader:
    """Metadata of a GGUF file whose tensors are all there. Raises ConfigError for any other file."""
    try:
        reader = GGUFReader(path)
        keys = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
        fields = [reader.get_field(key) for key in keys]
        architecture, model, pre = (field.contents() if field is not None else None for field in fields)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:  # gguf checks nothing itself
        raise ConfigError(f"model.name: {path} is damaged, cut short or no GGUF file ({error})") from None
    if architecture is None:
        raise ConfigError(f"model.name: {path} names no general.architecture: it holds no model")
    return GGUFHeader(architecture, tokenizer_model=model, pre_tokenizer=pre)


def read_gguf_config(path: Path, header: GGUFHeader) -> PreTrainedConfig:
    """The transformers config of the file. Raises ConfigError if transformers cannot read its architecture."""
    try:
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=str(path.resolve()))
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"model.name: transformers cannot read the GGUF architecture '{header.architecture}' of {path} "
            f"({_first_line(error)}); use the model's safetensors"
        ) from None


def load_gguf_tokenizer(path: Path, header: GGUFHeader) -> PreTrainedTokenizerBase:
    """The tokenizer stored in the file, splitting text as llama.cpp does for its `tokenizer.ggml.pre`.

    transformers knows the patterns of Llama 3, Qwen and some others, and takes GPT-2's for all the rest: for those
    that split digits apart, "a  2" would become other tokens than the model was trained on.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=str(path.resolve()))
    if header.tokenizer_model != "gpt2":
        return tokenizer
    backend: Tokenizer = tokenizer.backend_tokenizer
    if header.pre_tokenizer in DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif header.pre_tokenizer not in GPT2_PATTERN and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        logger.warning(
            "%s: its pre-tokenizer '%s' is unknown here and is taken for GPT-2's, which may split text otherwise than "
            "in training; name the model's own tokenizer in model.tokenizer",
            path,
            header.pre_tokenizer,
        )
    return tokenizer


def load_gguf_weights(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The dequantised model and transformers' loading report (`missing_keys` …).

    `dequantize=True`: plain dense weights also where a kernel could compute with the quantised blocks, and no quantiser
    left on the model (transformers neither saves nor trains one that has it).
    """
    with redirect_stderr(StringIO()):  # its progress bar heeds no setting
        model, report = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=str(path.resolve()),
            config=config,
            dtype=dtype,
            attn_implementation=None,
            output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),
        )
    return model, report


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file as float32 safetensors with config, tokenizer and chat template."""
    header = read_gguf_header(path)
    with quiet_transformers():
        model, _ = load_gguf_weights(path, read_gguf_config(path, header), torch.float32)
        tokenizer = load_gguf_tokenizer(path, header)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
