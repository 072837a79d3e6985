"""Results, plot and tables on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.frontier.arms import ARMS
from benchmarks.frontier.figure import draw_frontier
from benchmarks.frontier.summary import REFERENCE, points, summarise, table
from benchmarks.frontier.tasks import TITLES
from benchmarks.frontier.trial import Task, untrained_loss
from benchmarks.provenance import provenance
from benchmarks.report import RESULTS
from benchmarks.workloads import ROOT

PAGE = ROOT / "docs" / "optimizers.md"
IMAGES = ROOT / "docs" / "images"
START, END = "<!-- frontier:start -->", "<!-- frontier:end -->"


def write_frontier(folder: Path, task: Task, studies: Mapping[str, Any], work: Path) -> Path:
    """Put the studies of one task into `folder`/frontier/TASK.json; where `folder` is the project's own, also draw the
    plot and write the tables of all tasks into docs/optimizers.md.
    """
    untrained = untrained_loss(task, ARMS[REFERENCE], work)
    path = folder / "frontier" / f"{task.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "task": task.name,
        "title": TITLES[task.name],
        "steps": task.steps,
        "records_per_step": task.records,
        "held_out_records": task.held_out,
        "tokens": studies[REFERENCE]["runs"][0]["tokens"],
        "parameters": studies[REFERENCE]["runs"][0]["parameters"],
        "untrained_loss": untrained,
        "rows": summarise(studies, untrained),
        "train_losses": {name: [run["train_losses"] for run in study["runs"]] for name, study in studies.items()},
        "provenance": provenance("cpu", 1),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    if folder == RESULTS:
        results = [json.loads(p.read_text()) for name in TITLES if (p := path.with_name(f"{name}.json")).is_file()]
        for one in results:
            draw_frontier(points(one["rows"]), IMAGES / f"frontier-{one['task']}.svg", heading(one))
        update_page(PAGE, results)
    return path


def heading(result: Mapping[str, Any]) -> str:
    return f"{result['title']}, {result['steps']} steps, {result['tokens']:,} tokens"


def section(result: Mapping[str, Any]) -> str:
    """Plot and table of one task."""
    name = heading(result)
    return (
        f"### {name[0].upper()}{name[1:]}\n\n"
        f"![Bytes per parameter against held-out loss, {name}](images/frontier-{result['task']}.svg)\n\n"
        f"Untrained: {result['untrained_loss']:.4f}. Each learning rate is the best of a search in steps of √10 with "
        f"the first seed.\n\n{table(result['rows'])}"
    )


def update_page(page: Path, results: list[Mapping[str, Any]]) -> None:
    """Raises ValueError if the page has no place for the tables."""
    text = page.read_text()
    if START not in text or END not in text:
        raise ValueError(f"{page}: {START} and {END} are missing")
    before, after = text.split(START)[0], text.split(END, 1)[1]
    page.write_text(f"{before}{START}\n\n" + "\n".join(map(section, results)) + f"\n{END}{after}")
