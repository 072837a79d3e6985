"""`python -m benchmarks frontier`: tune and run the arms, then write results, plots and tables."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.frontier.arms import ARMS
from benchmarks.frontier.study import study_arm
from benchmarks.frontier.summary import REFERENCE
from benchmarks.frontier.tasks import RATES, TaskName, make_task
from benchmarks.frontier.trial import Task
from benchmarks.frontier.write import write_frontier
from benchmarks.report import RESULTS

DEFAULT_WORK_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunelab" / "benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    names: list[str] = options.optimizers
    task = make_task(options.task, options.work_folder)
    if options.steps is not None:
        task = replace(task, steps=options.steps)
    jobs = [(task, name, options.seeds, options.work_folder) for name in names]
    if options.workers == 1:
        studies = [_study(job) for job in jobs]
    else:
        with get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
            studies = pool.map(_study, jobs, chunksize=1)
    path = write_frontier(options.output, task, dict(zip(names, studies, strict=True)), options.work_folder)
    print(path, file=sys.stderr)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks frontier", description=__doc__)
    parser.add_argument("--task", choices=get_args(TaskName), default="tune")
    parser.add_argument(
        "--optimizers", type=lambda text: text.split(","), help="names, with commas; default: all of the task"
    )
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of a run; default: the task's own")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    parser.add_argument("--work", dest="work_folder", type=Path, default=DEFAULT_WORK_FOLDER, metavar="FOLDER")
    options = parser.parse_args(arguments)
    known = list(ARMS) if options.task == "tune" else list(RATES[options.task])
    options.optimizers = options.optimizers or known
    if REFERENCE not in options.optimizers:
        parser.error(f"--optimizers: losses are set against {REFERENCE}'s, so it is needed")
    if unknown := [name for name in options.optimizers if name not in known]:
        parser.error(f"--optimizers {','.join(unknown)}: give some of {','.join(known)}")
    return options


def _study(job: tuple[Task, str, list[int], Path]) -> dict[str, Any]:
    task, name, seeds, work = job
    torch.set_num_threads(1)
    centre = ARMS[name].rate if task.name == "tune" else RATES[task.name][name]
    return study_arm(task, name, centre, seeds, work)


if __name__ == "__main__":
    sys.exit(main())
