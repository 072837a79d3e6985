"""Small random models and their folders, GGUF files included, for the tests of this room."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tunelab.models.loaded import LoadedModel
from tunelab.models.tiny import build_tiny_tokenizer
from tunelab.parallel import resolve_precision

CPU = torch.device("cpu")
VOCABULARY = 1024


def small_gpt2(seed: int = 0, **changes: object) -> GPT2LMHeadModel:
    """GPT-2 with weights ten times its usual size: its next-token distributions are far from uniform."""
    options: dict = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **(options | changes))
    return GPT2LMHeadModel(config).eval()


def small_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Llama with grouped-query attention: four query heads share two key-value heads."""
    options: dict = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **(options | changes))
    return LlamaForCausalLM(config).eval()


def as_loaded(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(model, build_tiny_tokenizer(), "test", CPU, resolve_precision("float32", CPU))


def save_folder(model: PreTrainedModel, folder: Path) -> Path:
    """A model folder as transformers itself writes it."""
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def llama_cpp_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp stores them (convert_hf_to_gguf.py, LlamaModel.permute).

    transformers rotates dimension j of a head together with j + K/2, llama.cpp 2j with 2j + 1; so row (half h, j) of
    each head is stored at row 2j + h.
    """
    stored = np.empty_like(weight)
    size = len(weight) // num_heads
    for head in range(num_heads):
        for half in (0, 1):
            for j in range(size // 2):
                stored[head * size + 2 * j + half] = weight[head * size + half * (size // 2) + j]
    return stored


def write_gguf(
    model: LlamaForCausalLM,
    path: Path,
    pre_tokenizer: str = "gpt-2",
    quantization: gguf.GGMLQuantizationType | None = None,
) -> dict[str, np.ndarray]:
    """Write a Llama as llama.cpp's converter does; returns the dequantised tensors under transformers' names."""
    config, tokenizer = model.config, build_tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if i == 0 else 1 for _, i in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    expected = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        stored = weight
        for kind, count in heads.items():
            if kind in name:
                stored = llama_cpp_permutation(weight, count)
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None
        if quantization is not None and stored.ndim == 2:
            blocks = gguf.quantize(stored, quantization)
            writer.add_tensor(gguf_name, blocks, raw_dtype=quantization)
            expected[name] = gguf.dequantize(blocks, quantization)
        else:
            writer.add_tensor(gguf_name, stored)
            expected[name] = stored
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
