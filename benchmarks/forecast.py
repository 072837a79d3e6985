"""`python -m benchmarks forecast`: what `tunelab plan` foretold beside what runs then took, over many configurations.

Every configuration is a run of its own in a fresh process, of a few real steps through `tunelab.train`. Its forecast is
the one that the run itself recorded before it read any weights. Time is compared where a calibration of the machine was
made for it (`--time`), which wants a quiet machine; memory and FLOPs do not. A finished configuration is kept: the
command goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tunelab
from benchmarks.provenance import provenance
from benchmarks.report import RESULTS
from benchmarks.workloads import ROOT

PAGE = ROOT / "docs" / "plan.md"
START, END = "<!-- forecast:start -->", "<!-- forecast:end -->"
SIZES = {"gpt2-7m": (256, 8), "gpt2-26m": (512, 8)}
"""Random GPT-2s beside the built-in models: width and blocks, a vocabulary of 1,024."""

STEPS = 6
MEDIAN_TARGET, WORST_TARGET = 0.05, 0.15


@dataclass(frozen=True)
class Configuration:
    """`changes`: of the base recipe, by key path. `name` says what is particular."""

    model: str
    method: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.model} {self.method}, {self.name}"

    def recipe(self, models: Path, runs: Path, threads: int) -> dict[str, Any]:
        """The whole recipe as plain data."""
        name = str(models / self.model) if self.model in SIZES else self.model
        recipe: dict[str, Any] = {
            "model": {"name": name, "device": "cpu", "precision": "float32"},
            "data": {"train": "builtin:helpful-mini", "limit_train": 128, "max_length": 512},
            "method": {"name": self.method},
            "training": {
                "max_steps": STEPS,
                "save_steps": 1000,
                "num_threads": threads,
                "output_dir": str(runs),
                "run_name": "run",
            },
            "evaluation": {"eval_steps": 1000, "eval_samples": 8, "generation_prompts": 0},
        }
        for path, value in self.changes.items():
            section, key = path.split(".")
            recipe.setdefault(section, {})[key] = value
        return recipe


def _lora(**changes: Any) -> dict[str, Any]:
    return {"adapter.name": "lora", **{f"adapter.{key}": value for key, value in changes.items()}}


CONFIGURATIONS = (
    Configuration("tiny-gpt2", "sft", "adamw"),
    Configuration("tiny-gpt2", "dpo", "adamw"),
    Configuration("gpt2-7m", "sft", "adamw"),
    Configuration("gpt2-7m", "sft", "sgd, 256 tokens", {"optimizer.name": "sgd", "data.max_length": 256}),
    Configuration("gpt2-7m", "sft", "adamw, 128 tokens", {"data.max_length": 128}),
    Configuration("gpt2-7m", "sft", "checkpointing", {"training.gradient_checkpointing": True}),
    Configuration(
        "gpt2-7m",
        "sft",
        "2 × 4 records",
        {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 4},
    ),
    Configuration("gpt2-7m", "sft", "adafactor", {"optimizer.name": "adafactor"}),
    Configuration("gpt2-7m", "sft", "adamw_8bit", {"optimizer.name": "adamw_8bit"}),
    Configuration("gpt2-7m", "sft", "quarter", {"optimizer.name": "quarter"}),
    Configuration(
        "gpt2-7m", "sft", "gradient release", {"training.gradient_release": True, "training.max_grad_norm": None}
    ),
    Configuration("gpt2-7m", "sft", "its own blocks", {"model.kernels": "plain"}),
    Configuration("gpt2-7m", "sft", "lora r 16", _lora()),
    Configuration("gpt2-7m", "dpo", "adamw"),
    Configuration("gpt2-26m", "sft", "adamw"),
    Configuration("gpt2-26m", "sft", "adamw, batch 16", {"training.per_device_train_batch_size": 16}),
    Configuration("gpt2-26m", "sft", "checkpointing", {"training.gradient_checkpointing": True}),
    Configuration("gpt2-26m", "sft", "last 2 blocks", {"adapter.name": "partial", "adapter.last_layers": 2}),
    Configuration("gpt2-26m", "dpo", "lora r 64", _lora(r=64)),
    Configuration("gpt2-26m", "sft", "dora r 16", _lora(use_dora=True)),
    Configuration("gpt2-26m", "sft", "qlora r 16", {**_lora(), "model.load_in_4bit": True}),
    Configuration("gpt2-26m", "sft", "prompt tuning", {"adapter.name": "prompt_tuning"}),
    Configuration("gpt2-26m", "dpo", "adafactor", {"optimizer.name": "adafactor"}),
    Configuration("smollm2-135m", "sft", "adamw, 128 tokens", {"data.max_length": 128}),
    Configuration("smollm2-135m", "sft", "lora r 16, 256 tokens", {**_lora(), "data.max_length": 256}),
    Configuration(
        "smollm2-135m", "sft", "qlora r 16, 256 tokens", {**_lora(), "model.load_in_4bit": True, "data.max_length": 256}
    ),
    Configuration("smollm2-135m", "dpo", "lora r 16, 256 tokens", {**_lora(), "data.max_length": 256}),
    Configuration(
        "smollm2-135m",
        "sft",
        "quarter, checkpointing",
        {"optimizer.name": "quarter", "training.gradient_checkpointing": True, "data.max_length": 256},
    ),
)
QUICK = ("tiny-gpt2 sft, adamw", "tiny-gpt2 dpo, adamw")


# --- one configuration, in a process of its own -----------------------------------------------------------------------


def run_one(recipe_path: Path, result: Path, calibrate: bool) -> None:
    """Train by the recipe and write down what it foretold and took; or calibrate the machine for it."""
    from tunelab.config import parse_recipe
    from tunelab.progress import SilentProgress

    recipe = parse_recipe(json.loads(recipe_path.read_text()))
    if calibrate:
        from tunelab.planner import plan_recipe

        result.write_text(json.dumps(plan_recipe(recipe, SilentProgress(), strict=True, calibrate=True)))
        return
    from tunelab.train import train

    record = train(recipe, progress=SilentProgress()).record()
    result.write_text(json.dumps({key: record[key] for key in ("forecast", "cost", "model", "versions")}))


def _child(recipe: Mapping[str, Any], result: Path, work: Path, calibrate: bool) -> None:
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        path = Path(scratch) / "recipe.json"
        path.write_text(json.dumps({**recipe, "training": {**recipe["training"], "output_dir": scratch}}))
        command = [sys.executable, "-m", "benchmarks.forecast", "one", str(path), str(result)]
        environment = os.environ | {"OMP_NUM_THREADS": str(recipe["training"]["num_threads"])}
        log = result.with_suffix(".log")
        with log.open("w") as stream:
            ended = subprocess.run(
                [*command, *(["--calibrate"] if calibrate else [])],
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
    if ended.returncode:
        raise RuntimeError(f"{log} ends with\n" + "\n".join(log.read_text().splitlines()[-12:]))


# --- all of them ------------------------------------------------------------------------------------------------------


def measure(work: Path, configurations: Sequence[Configuration], threads: int, with_time: bool) -> list[dict[str, Any]]:
    """Rows of the table, one a configuration; those measured before with the same code are read."""
    folder = work / "forecast" / _code_digest()
    folder.mkdir(parents=True, exist_ok=True)
    models = _make_models(work)
    rows = []
    for number, configuration in enumerate(configurations, 1):
        recipe = configuration.recipe(models, folder, threads)
        key = hashlib.sha256(json.dumps([recipe, with_time], sort_keys=True).encode()).hexdigest()[:16]
        result = folder / f"{key}.json"
        if not result.is_file():
            print(f"[{number}/{len(configurations)}] {configuration.title} …", file=sys.stderr, flush=True)
            try:
                if with_time:
                    _child(recipe, result.with_suffix(".plan"), work, calibrate=True)
                _child(recipe, result, work, calibrate=False)
            except RuntimeError as error:
                print(f"{configuration.title}: {error}", file=sys.stderr)
                continue
        row = _row(configuration, json.loads(result.read_text()))
        rows.append(row)
        print(f"[{number}/{len(configurations)}] {_line(row)}", file=sys.stderr, flush=True)
    return rows


def _row(configuration: Configuration, record: Mapping[str, Any]) -> dict[str, Any]:
    forecast, cost = record["forecast"], record["cost"]
    figures = {
        "peak_memory_bytes": (forecast["memory"]["peak_bytes"], cost["peak_memory_bytes"]),
        "flops": (forecast["compute"]["flops"], cost["flops"]),
    }
    seconds = (forecast.get("time") or {}).get("seconds_per_token")
    if seconds is not None:
        figures["seconds_per_token"] = (seconds, cost["seconds"]["training"] / cost["tokens"])
    return {
        "configuration": configuration.title,
        "parameters": record["model"]["parameters"],
        "path": forecast["path"],
        "moment": forecast["memory"]["moment"],
        "parts": forecast["memory"]["parts"],
        "figures": {
            name: {"forecast": foretold, "measured": measured, "error": foretold / measured - 1}
            for name, (foretold, measured) in figures.items()
        },
    }


def _line(row: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name} {figure['error']:+.1%}" for name, figure in row["figures"].items())
    return f"{row['configuration']}: {shown}"


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median and worst size of the errors, by figure."""
    found = {}
    for name in ("peak_memory_bytes", "flops", "seconds_per_token"):
        errors = [abs(row["figures"][name]["error"]) for row in rows if name in row["figures"]]
        if errors:
            found[name] = {"median": statistics.median(errors), "worst": max(errors), "configurations": len(errors)}
    return found


def table(result: Mapping[str, Any]) -> str:
    """Markdown for docs/plan.md."""
    lines = [
        "| configuration | peak memory: forecast | measured | error | time a token: forecast | measured | error |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        memory, time = row["figures"]["peak_memory_bytes"], row["figures"].get("seconds_per_token")
        cells = [row["configuration"], *(f"{memory[key] / 2**20:,.0f} MiB" for key in ("forecast", "measured"))]
        cells.append(f"{memory['error']:+.1%}")
        if time is None:
            cells += ["", "", ""]
        else:
            cells += [*(f"{time[key] * 1e3:.2f} ms" for key in ("forecast", "measured")), f"{time['error']:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, words in (
        ("peak_memory_bytes", "Peak memory"),
        ("seconds_per_token", "Time a token"),
        ("flops", "FLOPs (against those the run counted)"),
    ):
        if name in result["summary"]:
            errors = result["summary"][name]
            lines.append(
                f"{words}: median error {errors['median']:.1%}, worst {errors['worst']:.1%}, over "
                f"{errors['configurations']} configurations.  "
            )
    made = result["provenance"]
    lines.append(f"\n{made['cpu']}, {made['threads']} threads; `{made['command']}`, {made['date'][:10]}.")
    return "\n".join(lines) + "\n"


def _make_models(work: Path) -> Path:
    folder = work / "forecast" / "models"
    for name, (width, blocks) in SIZES.items():
        if (folder / name / "config.json").is_file():
            continue
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        from tunelab.models.tiny import build_tiny_tokenizer

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=1024, n_embd=width, n_layer=blocks, n_head=width // 64, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        build_tiny_tokenizer().save_pretrained(folder / name)
    return folder


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(tunelab.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def write_page(result: Mapping[str, Any]) -> None:
    """The table between the markers of docs/plan.md."""
    text = PAGE.read_text()
    before, rest = text.split(START, 1)
    PAGE.write_text(f"{before}{START}\n{table(result)}{END}{rest.split(END, 1)[1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks forecast", description=__doc__)
    parser.add_argument("--time", action="store_true", help="calibrate and compare time too: on a quiet machine")
    parser.add_argument("--quick", action="store_true", help="two small configurations; nothing is published")
    parser.add_argument("--only", help="configurations whose title contains this")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=RESULTS / "forecast.json")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunelab" / "benchmarks"
    parser.add_argument("--work", type=Path, default=default, metavar="FOLDER")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = [c for c in CONFIGURATIONS if (options.only or "") in c.title and (not options.quick or c.title in QUICK)]
    rows = measure(options.work, wanted, options.threads, options.time)
    result = {"summary": summary(rows), "rows": rows, "provenance": provenance("cpu", options.threads)}
    print(json.dumps(result["summary"], indent=1))
    if not options.quick and not options.only:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        if options.output == RESULTS / "forecast.json":
            write_page(result)
    return 0 if len(rows) == len(wanted) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        run_one(Path(sys.argv[2]), Path(sys.argv[3]), "--calibrate" in sys.argv)
        sys.exit(0)
    sys.exit(main())
