"""`python -m benchmarks frontier|sft|lora|dpo|generate|startup|all|tables`: arguments, and the order of things."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.adapters import count_adapter_processes, measure_adapters
from benchmarks.forecast import main as run_forecasts
from benchmarks.frontier.__main__ import main as run_frontier
from benchmarks.gains import count_gain_processes, measure_gains
from benchmarks.generation import count_generation_processes, measure_generation
from benchmarks.jobs import Work
from benchmarks.methods import main as run_methods
from benchmarks.peers import ONE_OF_THE_BEST, WANTED
from benchmarks.provenance import provenance
from benchmarks.report import (
    ENGINE_PAGE,
    README,
    RESULTS,
    read_results,
    results_page,
    update_engine_page,
    update_readme,
    write_result,
)
from benchmarks.runner import ArmFailed, Runner, session_folder
from benchmarks.startup import measure_startup
from benchmarks.training import Settings, count_processes, measure_training
from benchmarks.workloads import Mix, ModelName

TABLE: tuple[tuple[str, ModelName | None, Mix | None], ...] = (
    ("sft", "gpt2", "short"),
    ("lora", "gpt2", "short"),
    ("dpo", "gpt2", "short"),
    ("dpo", "smollm2", "short"),
    ("sft", "gpt2", "equal"),
    ("generate", "smollm2", None),
    ("startup", None, None),
    ("sft", "smollm2", "short"),
    ("dpo", "gpt2", "long"),
)
"""What `all` measures: the published table first."""

WORKS = ("sft", "lora", "dpo", "generate", "startup", "gains", "adapters")


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["frontier"]:
        return run_frontier(given[1:])
    if given[:1] == ["forecast"]:
        return run_forecasts(given[1:])
    if given[:1] == ["methods"]:
        return run_methods(given[1:])
    options = _parse(given)
    results_folder: Path = options.output
    if options.work == "tables":
        _write_tables(results_folder)
        return 0
    options.work_folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(options)
    items = _items(options)
    runner = Runner(
        work=options.work_folder,
        session=session_folder(options.work_folder),
        total=sum(_count(work, mix, settings, options.of) for work, _, mix in items),
        reuse_peer=options.reuse_peer,
    )
    for work, model, mix in items:
        try:
            result = _measure(work, model, mix, runner, settings, options.of)
        except (ArmFailed, ValueError) as error:
            print(f"benchmarks {work}: {error}", file=sys.stderr)
            return 1
        result["provenance"] = provenance(settings.device, settings.threads)
        path = write_result(results_folder, result)
        print(results_page([result]).split("\n## ", 1)[1])
        print(f"{path}", file=sys.stderr)
    if results_folder == RESULTS:
        _write_tables(results_folder)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "work", choices=[*WORKS, "all", "tables"], help="tables: write the tables anew, measure nothing"
    )
    parser.add_argument("--of", choices=get_args(Work)[:3], default="sft", help="gains: of what; default: %(default)s")
    parser.add_argument("--model", choices=get_args(ModelName), help="default: gpt2; for generate: smollm2")
    parser.add_argument("--mix", choices=get_args(Mix), default="short")
    parser.add_argument("--arms", default="defaults,best", help="of the peer, comma-separated")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a process")
    parser.add_argument("--batch-size", type=int, default=8, help="examples or pairs a step")
    parser.add_argument("--repeats", type=int, default=3, help="processes of the peer; tunelab gets one more")
    parser.add_argument("--data", help="preference pairs to use instead of hh-rlhf: whatever tunelab reads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], help="default: float32 on cpu, bf16 on cuda")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    parser.add_argument("--work", dest="work_folder", type=Path, default=_default_work_folder(), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="4 steps, one repeat; results go to FOLDER/quick")
    parser.add_argument("--reuse-peer", action="store_true", help="take the peer's repeats from earlier sessions")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.repeats = 4, 1
        if options.output == RESULTS:
            options.output = options.work_folder / "quick"
    wanted = (*WANTED, *(ONE_OF_THE_BEST if options.work in ("sft", "lora") else ()))
    if not set(options.arms.split(",")) <= set(wanted):
        parser.error(f"--arms {options.arms}: give one or more of {', '.join(wanted)}, with commas")
    if options.steps < 1 or options.repeats < 1:
        parser.error("--steps and --repeats are at least 1")
    return options


def _default_work_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunelab" / "benchmarks"


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        work_folder=options.work_folder,
        data=options.data,
        steps=options.steps,
        batch_size=options.batch_size,
        repeats=options.repeats,
        threads=options.threads,
        device=options.device,
        precision=options.precision or ("float32" if options.device == "cpu" else "bf16"),
        arms=tuple(options.arms.split(",")),
    )


def _items(options: argparse.Namespace) -> list[tuple[str, ModelName | None, Mix | None]]:
    if options.work == "all":
        return list(TABLE)
    if options.work == "startup":
        return [("startup", None, None)]
    if options.work == "generate":
        return [("generate", options.model or "smollm2", None)]
    return [(options.work, options.model or "gpt2", options.mix)]


def _count(work: str, mix: Mix | None, settings: Settings, of: Work) -> int:
    if work == "gains":
        return count_gain_processes(of, settings)
    if work == "adapters":
        return count_adapter_processes(settings)
    if work == "startup":
        return 0
    if work == "generate":
        return count_generation_processes(settings)
    return count_processes(_training_work(work), settings, mix)


def _measure(
    work: str, model: ModelName | None, mix: Mix | None, runner: Runner, settings: Settings, of: Work
) -> dict[str, Any]:
    if work == "startup":
        return measure_startup(settings)
    assert model is not None
    if work == "generate":
        return measure_generation(model, runner, settings)
    assert mix is not None
    if work == "adapters":
        return measure_adapters(model, mix, runner, settings)
    if work == "gains":
        return measure_gains(of, model, mix, runner, settings)
    return measure_training(_training_work(work), model, mix, runner, settings)


def _training_work(name: str) -> Work:
    return next(work for work in get_args(Work) if work == name)


def _write_tables(folder: Path) -> None:
    results = read_results(folder)
    (folder / "README.md").write_text(results_page(results))
    update_readme(README, results)
    update_engine_page(ENGINE_PAGE, results)


if __name__ == "__main__":
    sys.exit(main())
