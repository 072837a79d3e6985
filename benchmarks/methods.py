"""`methods`: what each cheap way of training gives and costs. Every arm sees the same tokens in the same order.

    python -m benchmarks methods                       # ten arms of 24 steps, about 20 minutes on two quiet cores
    python -m benchmarks methods --arms full,lora-16 --steps 48
    python -m benchmarks methods --tune                # each arm's learning rate chosen among three first
    python -m benchmarks methods --tables              # docs/adapters.md and its plot anew, from results/methods.json

SmolLM2-135M-Instruct on the preferred answers of hh-rlhf, one process an arm: `tunelab.train` with an ordinary recipe.
Learning rates are each kind's default (`learning_rate_factor` in tunelab's config/adapters.py, times full tuning's).
The held-out loss is per token over records that nothing was trained or tuned on; intervals are percentile bootstraps
over records, paired where two models are compared. An arm that was finished is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods_page import PAGE, PLOT, update_page, write_plot
from benchmarks.provenance import provenance
from benchmarks.runner import ArmFailed, session_folder
from benchmarks.workloads import DEFAULT_DATA, ROOT
from tunelab.config import parse_recipe
from tunelab.evaluation.statistics import bootstrap_mean, bootstrap_paired

RESULT = Path(__file__).with_name("results") / "methods.json"
TRAIN_DATA = DEFAULT_DATA.with_name("train.jsonl.gz")

LORA = {"name": "lora", "target_modules": "all-linear"}
ARMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "full": ("full tuning", None),
    "lora-1": ("LoRA, r = 1", LORA | {"r": 1}),
    "lora-4": ("LoRA, r = 4", LORA | {"r": 4}),
    "lora-16": ("LoRA, r = 16", LORA | {"r": 16}),
    "lora-64": ("LoRA, r = 64", LORA | {"r": 64}),
    "dora-16": ("DoRA, r = 16", LORA | {"r": 16, "use_dora": True}),
    "qlora-16": ("QLoRA, r = 16, NF4", LORA | {"r": 16}),
    "prefix": ("prefix tuning, 20 tokens", {"name": "prefix_tuning"}),
    "prompt": ("prompt tuning, 20 tokens", {"name": "prompt_tuning"}),
    "p-tuning": ("P-tuning, 20 tokens", {"name": "p_tuning"}),
}
"""name: (what it is called, its `adapter`). LoRA's alpha is 32 throughout, so that one rate suits every rank."""

TUNED_FACTORS = (1 / 3, 1.0, 3.0)
REPORTED_SEED, TUNING_SEED = 1, 2
"""Of the held-out samples: what is reported, and what rates are chosen by (records of both are left out there)."""


@dataclass(frozen=True)
class Settings:
    """What holds for every arm. records: held-out ones."""

    steps: int
    batch_size: int
    records: int
    threads: int
    train: str
    heldout: str
    seed: int = 0

    def recipe(self, adapter: Mapping[str, Any] | None, *, four_bit: bool, output: Path, name: str) -> dict[str, Any]:
        """An ordinary recipe: everything but the adapter is the same for all."""
        return {
            "model": {"name": "smollm2-135m", "device": "cpu", "precision": "float32", "load_in_4bit": four_bit},
            "data": {
                "train": self.train,
                "max_length": 512,
                "on_error": "skip",
                "limit_train": self.steps * self.batch_size,
            },
            "adapter": None if adapter is None else dict(adapter),
            "method": {"name": "sft"},
            "optimizer": {"name": "adamw", "schedule": {"lr_scheduler_type": "linear", "warmup_steps": 2}},
            "training": {
                "per_device_train_batch_size": self.batch_size,
                "max_steps": self.steps,
                "num_threads": self.threads,
                "seed": self.seed,
                "save_steps": 10**6,
                "output_dir": str(output),
                "run_name": name,
            },
            # The loss of every arm is measured afterwards, record by record; training need not stop for it.
            "evaluation": {"eval_steps": 10**6, "eval_samples": 4, "generation_prompts": 0},
        }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.tables:
        _write_tables(json.loads(RESULT.read_text()))
        return 0
    settings = Settings(
        options.steps, options.batch_size, options.records, options.threads, options.train, options.heldout
    )
    folder: Path = session_folder(options.work_folder) / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    names = list(ARMS) if options.arms is None else options.arms.split(",")
    try:
        found = {"before": _run(folder, "before", settings, None, factor=1.0, steps=0)}
        for name in names:
            factor = _tuned_factor(folder, name, settings) if options.tune else 1.0
            found[name] = _run(folder, name, settings, ARMS[name][1], factor=factor, steps=settings.steps)
    except ArmFailed as error:
        print(f"benchmarks methods: {error}", file=sys.stderr)
        return 1
    result = summarise(found, settings, tuned=options.tune) | {"provenance": provenance("cpu", settings.threads)}
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(options.output, file=sys.stderr)
    else:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        _write_tables(result)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", help=f"of {', '.join(ARMS)}, with commas; default: all")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each arm")
    parser.add_argument("--batch-size", type=int, default=8, help="records a step")
    parser.add_argument("--records", type=int, default=160, help="held-out records the loss is of")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tune", action="store_true", help="choose each learning rate among three, half as long")
    parser.add_argument("--train", default=str(TRAIN_DATA), help="default: %(default)s")
    parser.add_argument("--heldout", default=str(DEFAULT_DATA), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="write the JSON here, and no page")
    parser.add_argument("--tables", action="store_true", help="write page and plot anew, measure nothing")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunelab" / "benchmarks"
    parser.add_argument("--work", dest="work_folder", type=Path, default=cache, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.arms is not None and (wrong := set(options.arms.split(",")) - set(ARMS)):
        parser.error(f"--arms: {', '.join(sorted(wrong))}: give one or more of {', '.join(ARMS)}, with commas")
    for path in (options.train, options.heldout):
        if not options.tables and not path.startswith("builtin:") and not Path(path).exists():
            parser.error(f"{path} is missing; give --train and --heldout FILE (preference pairs or dialogues)")
    return options


# --- arms -----------------------------------------------------------------------------------------------------------


def _tuned_factor(folder: Path, name: str, settings: Settings) -> float:
    """The factor of the default learning rate that gives the least loss on records kept for choosing."""
    half = Settings(**{**vars(settings), "steps": max(1, settings.steps // 2)})
    losses = {}
    for factor in TUNED_FACTORS:
        found = _run(folder, name, half, ARMS[name][1], factor=factor, steps=half.steps, tuning=True)
        losses[factor] = sum(found["nll"]) / sum(found["tokens"])
    return min(losses, key=lambda factor: losses[factor])


def _run(
    folder: Path,
    name: str,
    settings: Settings,
    adapter: Mapping[str, Any] | None,
    *,
    factor: float,
    steps: int,
    tuning: bool = False,
) -> dict[str, Any]:
    """The answer of one arm: kept from before, or measured now in a fresh process."""
    recipe = settings.recipe(adapter, four_bit=name.startswith("qlora"), output=folder / "runs", name=name)
    if factor != 1.0:
        recipe["optimizer"]["learning_rate"] = parse_recipe(recipe).optimizer.learning_rate * factor
    seed = TUNING_SEED if tuning else REPORTED_SEED
    job = {
        "recipe": recipe,
        "steps": steps,
        "heldout": {"data": settings.heldout, "records": settings.records, "seed": seed},
    }
    key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:12]
    job_path, result_path = folder / f"{name}-{key}.job.json", folder / f"{name}-{key}.json"
    if not result_path.is_file():
        print(f"methods: {name}{' (choosing its rate)' if tuning else ''} …", file=sys.stderr, flush=True)
        began = time.monotonic()
        job_path.write_text(json.dumps(job, indent=1))
        log = result_path.with_suffix(".log")
        command = [sys.executable, "-m", "benchmarks.arms.methods_arm", str(job_path), str(result_path)]
        environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as stream:
            ended = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False
            )
        if ended.returncode != 0 or not result_path.is_file():
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise ArmFailed(f"{name} ended with status {ended.returncode}; {log} ends with\n{tail}")
        print(f"methods: {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(result_path.read_text())
    return found


# --- figures --------------------------------------------------------------------------------------------------------


def summarise(found: Mapping[str, Mapping[str, Any]], settings: Settings, *, tuned: bool) -> dict[str, Any]:
    """Every arm's share, memory, speed and loss; `before` first. `change` is paired with what the arm started from,
    `against_full` with full tuning, on the same records.
    """
    before = found["before"]
    rows = [{"arm": "before", "title": "before training", "loss": _loss(before), "parameters": before["parameters"]}]
    for name, own in found.items():
        if name == "before":
            continue
        assert own["records"] == before["records"], "every arm is scored on the same records"
        start = own.get("before", before)
        cost = own["cost"]
        row = {
            "arm": name,
            "title": ARMS[name][0],
            "parameters": own["parameters"],
            "trainable_parameters": own["trainable_parameters"],
            "trainable_share": own["trainable_parameters"] / own["parameters"],
            "learning_rate": own["learning_rate"],
            "tokens": cost["tokens"],
            "tokens_per_second": cost["tokens_per_second"],
            "seconds": cost["seconds"]["training"],
            "peak_memory_bytes": cost["peak_memory_bytes"],
            "forecast_peak_memory_bytes": own["forecast_and_measured"]["peak_memory_bytes"]["forecast"],
            "layout": own["layout"],
            "loss": _loss(own),
            "loss_before": _loss(start),
            "change": _difference(own, start),
            "train_losses": own["train_losses"],
        }
        if "full" in found and name != "full":
            row["against_full"] = _difference(own, found["full"])
        rows.append(row)
    tokens = {row["tokens"] for row in rows if "tokens" in row}
    assert len(tokens) <= 1, "every arm trains on the same tokens"
    return {
        "benchmark": "methods",
        "model": "smollm2-135m",
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "tokens": tokens.pop() if tokens else 0,
        "heldout_records": len(before["records"]),
        "train": settings.train,
        "heldout": settings.heldout,
        "learning_rates": "chosen among three" if tuned else "defaults",
        "confidence": 0.95,
        "rows": rows,
        "scores": {name: {"nll": own["nll"], "tokens": own["tokens"]} for name, own in found.items()},
    }


def _loss(own: Mapping[str, Any]) -> dict[str, float | int]:
    """Nats per token, with a 95% interval over records."""
    return bootstrap_mean(own["nll"], np.asarray(own["tokens"], np.float64)).to_json()


def _difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float | int]:
    return bootstrap_paired(own["nll"], other["nll"], np.asarray(own["tokens"], np.float64)).to_json()


def _write_tables(result: Mapping[str, Any]) -> None:
    update_page(PAGE, result)
    write_plot(PLOT, result)


if __name__ == "__main__":
    sys.exit(main())
