"""The small model of the frontier: GPT-2's shape with 7.0 million parameters, its tokenizer, texts and pretraining.

The base model reads the chosen dialogues of `../shared/data`'s train.jsonl.gz, people asking an assistant. It is then
fine-tuned on people chatting with each other: near enough to use what it knows, and far enough for a loss to fall.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import ROOT
from tunelab.config import AdamWConfig, ModelConfig, SFTConfig
from tunelab.config.schedules import CosineSchedule
from tunelab.data import Dataset, Loader, load_records, pack, prepare, split_by_tokens
from tunelab.models.engine import choose_layout
from tunelab.models.loading import load_model
from tunelab.objectives import build_objective
from tunelab.optim import build_optimizer, build_schedule
from tunelab.training.state import TrainState
from tunelab.training.step import MicroBatch, train_step

DATA = ROOT.parent / "shared" / "data" / "hh-rlhf"
CHATS_WHEEL = "chitchat-dataset==0.9.0"
"""7,168 conversations between two people, on PyPI (MIT; Myers et al. 2020, "Conversational Scaffolding")."""
CHATS, LEAST_TURNS = 2000, 4

VOCABULARY, CONTEXT = 8192, 512
END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 300
"""Last records of the fine-tuning data, on which every arm is measured."""

PRETRAIN_EPOCHS = 3
PRETRAIN_RECORDS = 8
PRETRAIN_LEARNING_RATE = 1e-3
MICRO_BATCH_TOKENS = 2048
SEED = 0


def prepare_base(folder: Path) -> Path:
    """The pretrained small model, made once: half an hour on one core."""
    target = folder / "frontier" / "base"
    if (target / "model.safetensors").is_file():
        return target
    texts = prepare_texts(folder)
    start = prepare_scratch(folder)
    loaded = load_model(ModelConfig(name=str(start), precision="float32"))
    choose_layout(loaded, "auto", CONTEXT)
    dataset = read_texts(texts / "train.jsonl.gz", loaded.tokenizer)
    loader = Loader(len(dataset), PRETRAIN_RECORDS, PRETRAIN_EPOCHS, seed=SEED)
    config = AdamWConfig(
        learning_rate=PRETRAIN_LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        schedule=CosineSchedule(warmup_ratio=0.05),
    )
    schedule = build_schedule(config.schedule, loader.num_steps)
    state = TrainState(loaded, build_optimizer(loaded.model.named_parameters(), config, "cpu"), None)
    objective = build_objective(SFTConfig())
    began = time.perf_counter()
    for step in range(loader.num_steps):
        micro_batches = make_micro_batches(dataset, loader.indices(step))
        rate = config.learning_rate * schedule(step)
        metrics = train_step(state, objective, micro_batches, learning_rate=rate, max_grad_norm=1.0)
        if step % 20 == 0 or step == loader.num_steps - 1:
            print(
                f"base: step {step}/{loader.num_steps}, loss {metrics['train/loss']:.3f}, "
                f"{time.perf_counter() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    temporary = target.with_name("base.tmp")
    loaded.model.save_pretrained(temporary)
    loaded.tokenizer.save_pretrained(temporary)
    temporary.rename(target)
    return target


def prepare_scratch(folder: Path) -> Path:
    """The small model with GPT-2's random initialisation, and its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    target = folder / "frontier" / "scratch"
    if (target / "model.safetensors").is_file():
        return target
    temporary = target.with_name("scratch.tmp")
    texts = prepare_texts(folder)
    _train_tokenizer(texts / "train.jsonl.gz").save_pretrained(temporary)
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=6,
        n_head=8,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    GPT2LMHeadModel(config).save_pretrained(temporary)
    temporary.rename(target)
    return target


def prepare_texts(folder: Path) -> Path:
    """`train.jsonl.gz`: the dialogues to pretrain on, and `chats.jsonl.gz`: those to fine-tune on, as {"text"}."""
    target = folder / "frontier" / "texts"
    if not target.is_dir():
        temporary = target.with_name("texts.tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        with gzip.open(DATA / "train.jsonl.gz", "rt") as source, gzip.open(temporary / "train.jsonl.gz", "wt") as sink:
            for line in source:
                sink.write(json.dumps({"text": json.loads(line)["chosen"]}) + "\n")
        temporary.rename(target)
    if not (target / "chats.jsonl.gz").is_file():
        _write_chats(target / "chats.jsonl.gz", folder)
    return target


def _write_chats(path: Path, folder: Path) -> None:
    """The first `CHATS` long enough, in the base model's own form; a person's messages in a row are one turn."""
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", downloads, CHATS_WHEEL], check=True, stdout=sys.stderr)
        with zipfile.ZipFile(next(Path(downloads).glob("*.whl"))) as wheel:
            conversations = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    texts = []
    for name in sorted(conversations):
        turns = [" ".join(message["text"] for message in turn) for turn in conversations[name]["messages"]]
        if len(turns) >= LEAST_TURNS:
            speakers = ("Human", "Assistant")
            texts.append("".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns)))
    temporary = path.with_suffix(".tmp")
    with gzip.open(temporary, "wt") as sink:
        sink.write("".join(json.dumps({"text": text}) + "\n" for text in texts[:CHATS]))
    temporary.replace(path)


def _train_tokenizer(path: Path) -> Any:
    """Byte-level BPE (Radford et al. 2019, §2.2) of 8192 pieces, on the pretraining text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with gzip.open(path, "rt") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def read_texts(path: Path, tokenizer: Any, max_length: int = CONTEXT) -> Dataset:
    """Whole texts, loss on every token but the first."""
    return prepare(load_records(str(path)), tokenizer, method="sft", max_length=max_length)


def read_answers(tokenizer: Any, max_length: int = CONTEXT) -> Dataset:
    """Prompts and chosen answers of helpful-base, loss on the answers."""
    records = load_records(str(DATA / "test.jsonl.gz"), on_error="skip")
    return prepare(records, tokenizer, method="sft", render="transcript", max_length=max_length)


def make_micro_batches(dataset: Dataset, indices: np.ndarray | Sequence[int]) -> list[MicroBatch]:
    """One step's records in packed rows of at most `MICRO_BATCH_TOKENS`, as a run splits them."""
    chosen = np.asarray(indices)
    return [
        MicroBatch(pack([dataset.examples[i] for i in part], part.tolist()))
        for part in split_by_tokens(chosen, dataset.num_tokens[chosen], MICRO_BATCH_TOKENS)
    ]
