"""`tiny-gpt2`: a random GPT-2 small enough to train in seconds, built in memory, for tests and first tries.

Its tokenizer is GPT-2's algorithm (byte-level BPE) trained on the plain English of `assets/tiny-corpus.txt`, which was
written for this project. `train_tiny_tokenizer` regenerates `assets/tiny-tokenizer.json`.
"""

from __future__ import annotations

import json
from importlib import resources

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1024
WEIGHTS_SEED = 0

_ASSETS = resources.files("tunelab.models") / "assets"


def tiny_config() -> GPT2Config:
    """Two blocks of width 64, four heads, context 512: 198 thousand parameters. Dropout is GPT-2's own 0.1."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=512,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )


def build_tiny_model(config: GPT2Config) -> GPT2LMHeadModel:
    """The same weights every time (GPT-2's initialisation from a fixed seed), without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(WEIGHTS_SEED)
        return GPT2LMHeadModel(config).eval()


def build_tiny_tokenizer() -> PreTrainedTokenizerBase:
    """The packaged tokenizer, as transformers' GPT-2 tokenizer: `<|endoftext|>` is id 0, no padding token."""
    bpe = json.loads((_ASSETS / "tiny-tokenizer.json").read_text(encoding="utf-8"))["model"]
    return GPT2Tokenizer(vocab=bpe["vocab"], merges=[tuple(merge) for merge in bpe["merges"]], model_max_length=512)


def train_tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019, §2.2): every byte is a token, so every text has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (_ASSETS / "tiny-corpus.txt").read_text(encoding="utf-8")
    tokenizer.train_from_iterator([corpus], trainer)
    return tokenizer
