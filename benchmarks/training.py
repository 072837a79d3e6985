"""`sft`, `lora` and `dpo`: tunelab against TRL, one comparison an arm."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.floors import compute_floors
from benchmarks.jobs import Job, Work
from benchmarks.peers import PeerArm, peer_arms
from benchmarks.runner import Runner
from benchmarks.summary import compare, compare_losses, summarise_side
from benchmarks.workloads import Mix, ModelName, prepare_workload


@dataclass(frozen=True)
class Settings:
    """What holds for a whole command."""

    work_folder: Path
    data: str | None
    steps: int
    batch_size: int
    repeats: int
    threads: int
    device: str
    precision: str
    arms: tuple[str, ...]


def all_arms(work: Work, settings: Settings, mix: Mix | None = None) -> list[PeerArm]:
    """The peer's arm of every comparison."""
    return [arm for wanted in settings.arms for arm in peer_arms(work, wanted, settings.device, mix)]


def count_processes(work: Work, settings: Settings, mix: Mix | None = None) -> int:
    return len(all_arms(work, settings, mix)) * (2 * settings.repeats + 1)


def measure_training(work: Work, model: ModelName, mix: Mix, runner: Runner, settings: Settings) -> dict[str, Any]:
    """Every arm of one piece of work; the result is a whole file of `results/` but for its provenance."""
    arms = all_arms(work, settings, mix)
    comparisons = [_compare_arm(work, model, mix, arm, runner, settings) for arm in arms]
    return {
        "work": work,
        "model": model,
        "mix": mix,
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "repeats": settings.repeats,
        "precision": settings.precision,
        "comparisons": comparisons,
        "best": strongest(comparisons) if len(comparisons) > 1 else None,
    }


def _compare_arm(
    work: Work, model: ModelName, mix: Mix, arm: PeerArm, runner: Runner, settings: Settings
) -> dict[str, Any]:
    workload = prepare_workload(
        work,
        model,
        mix,
        arm.order,
        folder=settings.work_folder,
        data=settings.data,
        steps=settings.steps,
        batch_size=settings.batch_size,
    )
    shared: dict[str, Any] = {
        "work": work,
        "model": str(workload.model),
        "examples": str(workload.examples),
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "threads": settings.threads,
        "device": settings.device,
        "precision": settings.precision,
    }
    ours, theirs = runner.interleave(
        Job(side="tunelab", **shared), Job(side="trl", options=arm.flags, **shared), settings.repeats
    )
    floors = compute_floors(work, workload.model, workload.examples, settings.batch_size)
    counts: dict[str, Any] = {
        "real_tokens": workload.real_tokens,
        "floors": floors.training,
        "reference_floors": floors.reference,
        "batch_size": settings.batch_size,
    }
    mine, other = summarise_side(ours, **counts), summarise_side(theirs, **counts)
    losses = compare_losses(ours, theirs, settings.precision)
    print_losses(f"{work} {model} {mix} against {arm.name}", losses)
    return {
        "arm": arm.name,
        "says": arm.says,
        "order": arm.order,
        "flags": arm.flags,
        "data": workload.source,
        "lengths": workload.lengths,
        "real_tokens": workload.real_tokens,
        "floor_flops": floors.training,
        "reference_floor_flops": floors.reference,
        "ours": mine,
        "peer": other,
        "ratios": compare(mine, other),
        "losses": losses,
        "interleaved": not any(run.get("reused_from_another_session") for run in theirs),
        "runs": {"ours": ours, "peer": theirs},
    }


def strongest(comparisons: list[dict[str, Any]]) -> str:
    """The peer's best arm: that against which our speed-up is the least."""
    weakest = min(comparisons, key=lambda entry: entry["ratios"]["examples_per_second_all"]["median"])
    return str(weakest["arm"])


def print_losses(title: str, losses: dict[str, Any]) -> None:
    """Both curves, step by step, on stderr."""
    print(f"losses, {title}: largest relative difference {losses['max_relative_difference']:.1e}", file=sys.stderr)
    for name in ("ours", "peer"):
        print(f"  {name:5}" + " ".join(f"{loss:.5f}" for loss in losses[name]), file=sys.stderr)
    if not losses["agree"]:
        print(f"  they differ by more than {losses['tolerance']:.0e}: this speed-up does not count", file=sys.stderr)
