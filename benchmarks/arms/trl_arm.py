"""The peer: TRL's trainers and transformers' `generate`, in the peer's environment.

Every flag an arm sets is in `_shared_flags` (the rules of the comparison) or in `job.options` (the arm's own).
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

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


class _Recorder(TrainerCallback):
    """Seconds from the end of a step to the end of the next, batch making included; the first from the loop's start.

    `parts` collects what `training_step` returns for each micro-batch: its share of the step's loss, so they add up.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.step_seconds: list[float] = []
        self.parts: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.step_seconds.append(now - self._last)
        self._last = now
        self.losses.append(torch.stack(self.parts).sum())
        self.parts.clear()


class _RecordedSFT(SFTTrainer):
    """Keeps each step's loss in full (the log rounds it) at no cost to the device."""

    recorder: _Recorder

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.recorder.parts.append(loss.detach())
        return loss


class _RecordedDPO(DPOTrainer):
    """As `_RecordedSFT`, and takes token ids as they are: DPOTrainer only reads text (SFTTrainer takes `input_ids`)."""

    recorder: _Recorder
    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        began = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.perf_counter() - began
        return dataset

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.recorder.parts.append(loss.detach())
        return loss


def measure(job: Job) -> dict[str, Any]:
    return _generate(job) if job.work == "generate" else _train(job)


def _train(job: Job) -> dict[str, Any]:
    recorder = _Recorder(job.device)
    examples = read_examples(job.examples)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _build_trainer(job, examples, recorder, folder)
        trainer.recorder = recorder
        if job.work == "lora":
            seed_adapter(trainer.model.named_parameters())
        clock.lap("setup")
        trainer.train()
        synchronize(job.device)
    clock.lap("training")
    return {
        "step_seconds": recorder.step_seconds,
        "losses": [loss.item() for loss in recorder.losses],
        "seconds": {**clock.seconds, "reference": getattr(trainer, "reference_seconds", 0.0)},
        "seconds_to_n": clock.seconds["setup"] + sum(recorder.step_seconds),
        "flags": job.options,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def _shared_flags(job: Job, folder: str) -> dict[str, Any]:
    """The rules: same optimizer, order, precision; nothing logged, saved or cut. All else is TRL's default."""
    on_cpu = job.device == "cpu"
    return {
        "output_dir": folder,
        "per_device_train_batch_size": job.batch_size,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATES[job.work],
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential",  # the file's order, on both sides
        "max_length": None,  # the examples were cut when they were tokenised
        "bf16": job.precision == "bf16",
        "use_cpu": on_cpu,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **({"gradient_checkpointing": False} if on_cpu else {}),  # on by default; on a CPU it only costs time
    }


def _build_trainer(job: Job, examples: list[TokenExample], recorder: _Recorder, folder: str) -> Any:
    flags = _shared_flags(job, folder) | job.options
    if flags.get("gradient_accumulation_steps") == "all":
        flags["gradient_accumulation_steps"] = job.batch_size // flags["per_device_train_batch_size"]
    common: dict[str, Any] = {
        "model": job.model,
        "processing_class": AutoTokenizer.from_pretrained(job.model),
        "callbacks": [recorder],
    }
    if job.work == "dpo":
        rows = [
            {"prompt_ids": e.prompt, "chosen_ids": e.completions[0], "rejected_ids": e.completions[1]} for e in examples
        ]
        return _RecordedDPO(args=DPOConfig(beta=DPO_BETA, **flags), train_dataset=Dataset.from_list(rows), **common)
    rows = [
        {"input_ids": e.prompt + e.completions[0], "labels": [-100] * len(e.prompt) + e.completions[0]}
        for e in examples
    ]
    adapter = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return _RecordedSFT(
        args=SFTConfig(**flags),
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter if job.work == "lora" else None,
        **common,
    )


def _generate(job: Job) -> dict[str, Any]:
    """`steps` times the same batch through `generate`: greedy, left-padded, exactly `new_tokens` each: with no
    end-of-sequence token to look for, no answer ends before."""
    prompts = [example.prompt for example in read_examples(job.examples)]
    options = dict(job.options)
    new_tokens = options.pop("new_tokens")
    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.bfloat16 if job.precision == "bf16" else torch.float32
    ).to(job.device)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(job.device)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = None
    clock.lap("setup")
    seconds: list[float] = []
    for _ in range(job.steps):
        began = time.perf_counter()
        output = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, **options)
        synchronize(job.device)
        seconds.append(time.perf_counter() - began)
    clock.lap("generation")
    tokens = output[:, batch["input_ids"].shape[1] :].tolist()
    return {
        "step_seconds": seconds,
        "tokens": tokens,
        "seconds": clock.seconds,
        "seconds_to_n": clock.total,
        "flags": job.options,
    }


if __name__ == "__main__":
    run_arm(measure)
