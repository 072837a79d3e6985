"""tunelab, driven through the functions a run is made of.

`_reference` and `_micro_batches` are the places to follow the engine when its functions change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.arms.common import Clock, run_arm, seed_adapter
from benchmarks.jobs import (
    BETAS,
    DPO_BETA,
    EPS,
    LEARNING_RATES,
    LORA_ALPHA,
    LORA_RANK,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Job,
    TokenExample,
    read_examples,
)
from benchmarks.measure import synchronize
from tunelab.config import AdamWConfig, DPOConfig, LoRAConfig, ModelConfig, SFTConfig
from tunelab.data import pack, pack_batches, split_by_tokens
from tunelab.models import logprobs, segments
from tunelab.models.adapters import attach_adapter
from tunelab.models.engine import choose_layout, sequence_logprobs
from tunelab.models.generation import GenerationSettings, generate
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import load_model
from tunelab.models.shortcuts import OWN_MODULES
from tunelab.objectives import build_objective
from tunelab.optim import build_optimizer
from tunelab.parallel import deterministic, keep_freed_memory
from tunelab.session import MICRO_BATCH_TOKENS
from tunelab.training.state import TrainState
from tunelab.training.step import MicroBatch, train_step
from tunelab.types import Completion, Example, Origin


def measure(job: Job) -> dict[str, Any]:
    if job.options.get("without") != "freed memory kept":
        keep_freed_memory()
    with deterministic():  # both as every run of tunelab
        return _generate(job) if job.work == "generate" else _train(job)


def _train(job: Job) -> dict[str, Any]:
    examples = [_example(example, number) for number, example in enumerate(read_examples(job.examples), 1)]
    clock = Clock()
    loaded = load_model(ModelConfig(name=job.model, device=job.device, precision=job.precision))
    if job.work == "lora":
        adapter = job.options.get("adapter", {"r": LORA_RANK, "lora_alpha": LORA_ALPHA})
        attach_adapter(loaded, LoRAConfig(target_modules="all-linear", **adapter), seed=0)
        seed_adapter(loaded.model.named_parameters())
    longest = max(len(e.prompt_ids) + len(c.ids) for e in examples for c in e.completions)
    without = job.options.get("without")
    layout: Literal["padded", "auto"] = "padded" if without == "packed rows" else "auto"
    choose_layout(loaded, layout, longest, job.options.get("kernels", "auto"))
    _switch_off(loaded, without)
    method = DPOConfig(beta=DPO_BETA) if job.work == "dpo" else SFTConfig()
    objective = build_objective(method)
    config = AdamWConfig(learning_rate=LEARNING_RATES[job.work], betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    state = TrainState(loaded, build_optimizer(loaded.model.named_parameters(), config, job.device), None)
    clock.lap("setup")
    reference = _reference(loaded, examples, job.batch_size) if objective.needs_reference else None
    synchronize(job.device)
    clock.lap("reference")

    losses: list[float] = []
    step_seconds: list[float] = []
    for step in range(job.steps):
        indices = np.arange(step * job.batch_size, (step + 1) * job.batch_size)
        budget = 1 if without == "micro-batches by tokens" else MICRO_BATCH_TOKENS[job.device]
        micro_batches = _micro_batches(examples, indices, reference, budget, without != "shared prompts")
        metrics = train_step(
            state, objective, micro_batches, learning_rate=config.learning_rate, max_grad_norm=MAX_GRAD_NORM
        )
        synchronize(job.device)
        step_seconds.append(clock.lap("training"))
        losses.append(metrics["train/loss"])
    return {
        "step_seconds": step_seconds,
        "losses": losses,
        "seconds": clock.seconds,
        "seconds_to_n": clock.total,
        "layout": f"{loaded.layout}: {loaded.layout_reason}",
        "shortcuts": asdict(loaded.shortcuts),
        "blocks": loaded.blocks_reason,
        "trainable_parameters": sum(p.numel() for p in loaded.model.parameters() if p.requires_grad),
    }


def _switch_off(loaded: LoadedModel, without: str | None) -> None:
    """For `benchmarks gains`: do without one of the engine's shortcuts."""
    match without:
        case "fused blocks":
            loaded.shortcuts = OWN_MODULES
        case "products through oneDNN":
            torch.backends.mkldnn.is_available = lambda: False
        case "last block pruned":
            loaded.shortcuts = replace(loaded.shortcuts, prune_last_block=False)
        case "gradient in the forward pass":
            loaded.shortcuts = replace(loaded.shortcuts, gradient_in_forward=False)
        case "attention in blocks of queries":
            segments.BLOCK_QUERIES = dict.fromkeys(segments.BLOCK_QUERIES, 2**30)
        case "logits in blocks of the vocabulary":
            logprobs.CPU_VOCABULARY_BLOCK = 2**30


def _example(example: TokenExample, number: int) -> Example:
    completions = tuple(Completion(np.asarray(ids, np.int32), np.ones(len(ids), bool)) for ids in example.completions)
    return Example(np.asarray(example.prompt, np.int32), completions, Origin("benchmark", number))


def _micro_batches(
    examples: Sequence[Example], indices: np.ndarray, reference: np.ndarray | None, budget: int, shared: bool
) -> list[MicroBatch]:
    """One step's examples in packed rows of at most `budget` tokens, as a run splits them. shared: the answers
    of a pair share its prompt, else each gets a copy.
    """
    lengths = np.asarray([examples[i].num_tokens for i in indices])
    return [
        MicroBatch(
            pack([examples[i] for i in part] if shared else _apart(examples, part), part.tolist()),
            None if reference is None else torch.from_numpy(reference[part]),
        )
        for part in split_by_tokens(indices, lengths, budget)
    ]


def _apart(examples: Sequence[Example], part: np.ndarray) -> list[Example]:
    """Every completion as an example of its own."""
    return [replace(examples[i], completions=(c,)) for i in part for c in examples[i].completions]


def _reference(loaded: LoadedModel, examples: Sequence[Example], batch_size: int) -> np.ndarray:
    """(P, 2) reference log-probabilities of every pair that will be trained on, computed anew (no cache on disk)."""
    sums, _ = sequence_logprobs(loaded, pack_batches(examples, range(len(examples)), batch_size))
    return sums.reshape(-1, 2).astype(np.float32)


def _generate(job: Job) -> dict[str, Any]:
    """`steps` times the same batch: greedy, exactly `new_tokens` each, nothing ending an answer before."""
    prompts = [example.prompt for example in read_examples(job.examples)]
    clock = Clock()
    precision: Literal["float32", "bf16-pure"] = "bf16-pure" if job.precision == "bf16" else "float32"
    loaded = load_model(ModelConfig(name=job.model, device=job.device, precision=precision))
    choose_layout(loaded, "auto", longest=0)  # as chat and evaluation do: a trial of the fused blocks
    loaded.model.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = None
    settings = GenerationSettings(max_new_tokens=job.options["new_tokens"], batch_size=len(prompts))
    clock.lap("setup")
    seconds: list[float] = []
    for _ in range(job.steps):
        began = time.perf_counter()
        answers = generate(loaded, prompts, settings)
        synchronize(job.device)
        seconds.append(time.perf_counter() - began)
    clock.lap("generation")
    return {
        "step_seconds": seconds,
        "tokens": [list(answer.ids) for answer in answers],
        "seconds": clock.seconds,
        "seconds_to_n": clock.total,
    }


if __name__ == "__main__":
    run_arm(measure)
