"""Jobs in fresh processes, interleaved, each finished one kept: a benchmark that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tunelab
from benchmarks.jobs import Job
from benchmarks.peer_env import CONSTRAINTS, peer_python
from benchmarks.workloads import ROOT


class ArmFailed(Exception):  # noqa: N818  (says what happened)
    """A side's process ended without an answer."""


def session_folder(work: Path) -> Path:
    """Where finished repeats of this code are kept: another engine, arm or peer version starts a new session."""
    digest = hashlib.sha256(CONSTRAINTS.read_bytes())
    engine = Path(tunelab.__file__).parent
    here = Path(__file__).parent
    for path in sorted([*engine.rglob("*.py"), *here.glob("arms/*.py"), here / "jobs.py", here / "measure.py"]):
        digest.update(path.read_bytes())
    return work / "sessions" / digest.hexdigest()[:12]


@dataclass
class Runner:
    """Runs jobs for one command. `total` processes are expected, for the estimate of what is left."""

    work: Path
    session: Path
    total: int
    done: int = 0
    reuse_peer: bool = False

    def __post_init__(self) -> None:
        self.session.mkdir(parents=True, exist_ok=True)
        self._took: dict[str, list[float]] = {"tunelab": [], "trl": []}

    def interleave(self, ours: Job, theirs: Job, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A B A B … A: `repeats` of theirs, each between two of ours. Returns the results of ours and of theirs."""
        first, second = [self.run(ours, 0)], []
        for repeat in range(repeats):
            second.append(self.run(theirs, repeat))
            first.append(self.run(ours, repeat + 1))
        return first, second

    def run(self, job: Job, repeat: int) -> dict[str, Any]:
        """The answer of one repeat: kept from before, or measured now."""
        path = self.session / f"{job.key}-{repeat}.json"
        found = self._kept(path, job)
        if found is not None:
            self.done += 1
            return found
        began = time.monotonic()
        self._say(job, repeat, "…")
        run_job(job, path, self.work)
        self.done += 1
        self._took[job.side].append(time.monotonic() - began)
        result = _read(path)
        self._say(job, repeat, f"{statistics.median(result['step_seconds']):.2f} s a step")
        return result

    def _kept(self, path: Path, job: Job) -> dict[str, Any] | None:
        """A repeat finished before; with `reuse_peer`, the peer's of an earlier session too (marked as such)."""
        if path.is_file():
            return _read(path)
        if self.reuse_peer and job.side == "trl":
            earlier = sorted(self.work.glob(f"sessions/*/{path.name}"), key=lambda p: p.stat().st_mtime)
            if earlier:
                return _read(earlier[-1]) | {"reused_from_another_session": True}
        return None

    def _say(self, job: Job, repeat: int, text: str) -> None:
        known = [seconds for taken in self._took.values() for seconds in taken]
        left = f", {(self.total - self.done) * statistics.mean(known) / 60:.0f} min left" if known else ""
        name = f"{job.work} {Path(job.model).name[:7]} {job.side} #{repeat + 1}"
        print(f"[{self.done}/{self.total}{left}] {name}: {text}", file=sys.stderr, flush=True)


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def run_job(job: Job, result: Path, work: Path) -> None:
    """Run `job` in a fresh process of its side's environment; its answer is in `result` afterwards.

    Raises ArmFailed with the end of what the process said. Caches (reference log-probabilities, data sets, the hub)
    point into an empty folder: every repeat is a cold one.
    """
    python = peer_python(work) if job.side == "trl" else Path(sys.executable)
    log = result.with_suffix(".log")
    with tempfile.TemporaryDirectory(dir=work) as scratch, log.open("w") as stream:
        job_path = Path(scratch) / "job.json"
        job.write(job_path)
        environment = os.environ | {
            "TUNELAB_CACHE": f"{scratch}/tunelab",
            "HF_HOME": f"{scratch}/huggingface",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(job.threads),
        }
        if job.side == "trl":
            environment.pop("PYTHONPATH", None)
        command = [str(python), "-m", f"benchmarks.arms.{job.side}_arm", str(job_path), str(result)]
        ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if ended.returncode != 0 or not result.is_file():
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise ArmFailed(f"{job.side} ({job.work}) ended with status {ended.returncode}; {log} ends with\n{tail}")
