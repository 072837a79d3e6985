"""`tunelab runs`: list, show, compare. Reads run folders; never torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer

from tunelab.cli.options import Json, Run, RunsDir
from tunelab.cli.output import format_interval, format_speed, print_json, print_line, print_pairs, print_table
from tunelab.errors import ConfigError
from tunelab.progress import format_bytes, format_seconds

HELP = """\b
Example: tunelab runs method=dpo 'eval/loss<0.6'
Example: tunelab runs compare tiny-a tiny-b

The runs on disk. Without a command they are listed: `tunelab runs` is `tunelab runs list`.
"""

MAIN_METRICS = (
    "eval/loss",
    "eval/nll",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "train/loss",
    "tokens_per_second",
)
"""Metrics shown to people, in this order, where a run has them; `--json` gives all."""

COSTS = (
    "steps",
    "tokens",
    "flops",
    "floor_flops",
    "seconds.total",
    "tokens_per_second",
    "utilisation",
    "peak_memory_bytes",
)


def list_(
    filters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILTER",
            help="Conditions a run must meet: status=completed, method=dpo, model!=gpt2, 'eval/loss<2.5', "
            "'cost.tokens>=1e6', optimizer.name=adamw.",
            show_default=False,
        ),
    ] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many, the newest.", show_default=False)] = None,
    runs_dir: RunsDir = "runs",
    json: Json = False,
) -> None:
    """\b
    Example: tunelab runs list method=dpo 'eval/loss<0.6'

    Runs, oldest first, with what came of them.
    """
    from tunelab.report.compare import list_table
    from tunelab.runs import list_runs

    rows = list_table(list_runs(runs_dir), filters or ())[-last if last else None :]
    if json:
        print_json({"runs": rows})
    elif rows:
        columns = ["name", "method", "model", "trained", "status", "created", "steps", "eval/loss", "accuracy", "time"]
        droppable = ["created", "model", "trained", "steps", "accuracy", "time"]
        print_table(columns, [_row(row) for row in rows], droppable=droppable)
    else:
        what = "no run meets these conditions" if filters else f"no runs under {runs_dir}"
        print_line(f"{what}; `tunelab quickstart` makes two")


def _row(row: Mapping[str, Any]) -> list[str]:
    metrics = row["metrics"]
    return [
        row["name"],
        row["method"],
        row["model"],
        _trained(row),
        row["status"],
        _date(row["created"]),
        f"{row['steps']:,}" if row["steps"] is not None else "",
        _number(metrics.get("eval/loss")),
        _number(metrics.get("eval/rewards/accuracies")),
        format_seconds(row["seconds"]) if row["seconds"] is not None else "",
    ]


def show(run: Run, runs_dir: RunsDir = "runs", json: Json = False) -> None:
    """\b
    Example: tunelab runs show runs/tiny-dpo

    One run: how it stands, what came of it, what it cost, and the resolved recipe.
    """
    from tunelab.report.compare import list_table
    from tunelab.runs import RunFolder

    folder = RunFolder.open(run, runs_dir)
    (row,), record = list_table([folder]), folder.record()
    recipe = folder.recipe().resolved()
    if json:
        print_json({"run": row, "record": record, "recipe": recipe})
        return
    best = record.get("best")
    print_pairs(
        {
            "run": row["path"],
            "status": row["status"] + (f": {record['error']}" if record.get("error") else ""),
            "created": f"{_date(row['created'])}, finished {_date(row['finished'])}" if row["finished"] else "",
            "method": row["method"],
            "model": ", ".join(filter(None, (row["model"], _size(row)))),
            "best": f"step {best['step']}, eval/loss {_number(best['eval/loss'])}" if best else "",
            "result": ", ".join(f"{name} {_number(value)}" for name, value in _main_metrics(row["metrics"]).items()),
            "cost": _cost(row),
            "speed": format_speed(record.get("cost") or {}),
            "report": str(folder.path / "report.html") if (folder.path / "report.html").exists() else "",
            "continue": "" if row["status"] == "completed" else f"tunelab {row['method']} --resume {row['path']}",
        }
    )
    _print_forecast(record)
    print_line()
    print_line((folder.path / "config.yaml").read_text(encoding="utf-8").rstrip())


def _trained(row: Mapping[str, Any]) -> str:
    """The share of the parameters that is trained."""
    whole, trained = row["parameters"], row["trainable_parameters"]
    if not whole or trained is None:
        return ""
    return "all" if trained == whole else f"{trained / whole:.2%}"


def _size(row: Mapping[str, Any]) -> str:
    if not row["parameters"]:
        return ""
    share = _trained(row)
    part = f", {row['trainable_parameters']:,} ({share}) of them trained" if share not in ("", "all") else ""
    return f"{row['parameters']:,} parameters{part}"


def _print_forecast(record: Mapping[str, Any]) -> None:
    """What was foretold beside what came, as the report has it."""
    from tunelab.report.tables import forecast_table

    table = forecast_table(record)
    if table is not None:
        print_line()
        print_table(["", *table.columns[1:]], [[cell.text for cell in row] for row in table.rows])


def _cost(row: Mapping[str, Any]) -> str:
    if row["steps"] is None:
        return ""
    memory = format_bytes(row["peak_memory_bytes"])
    return f"{row['steps']:,} steps, {row['tokens']:,} tokens, {format_seconds(row['seconds'])}, {memory} of memory"


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Two runs or more, by name or folder.")],
    runs_dir: RunsDir = "runs",
    json: Json = False,
) -> None:
    """\b
    Example: tunelab runs compare dpo-sweep-a dpo-sweep-b dpo-sweep-c

    Runs side by side: where their recipes differ, what they measured, what they cost.
    """
    from tunelab.report.compare import compare as compare_runs
    from tunelab.runs import RunFolder

    if len(runs) < 2:
        raise ConfigError(f"give two runs or more: tunelab runs compare {runs[0]} OTHER")
    found = compare_runs([RunFolder.open(name, runs_dir) for name in runs])
    if json:
        print_json(found)
        return
    status = {"status": found["status"]}
    differing = {key: [_yaml(value) for value in values] for key, values in found["config_diff"].items()}
    cost = {name: found["cost"][name] for name in COSTS if name in found["cost"]}
    _print_side_by_side(found["runs"], "recipe", {**status, **differing}, lambda _, value: value)
    _print_side_by_side(found["runs"], "metric", _main_metrics(found["metrics"]), lambda _, value: _number(value))
    _print_side_by_side(found["runs"], "evaluated [95%]", found["evaluation"], lambda _, value: format_interval(value))
    _print_side_by_side(found["runs"], "model", found["model"], lambda _, value: _number(value))
    _print_side_by_side(found["runs"], "cost", cost, _cost_cell)


def _print_side_by_side(
    runs: Sequence[str], title: str, rows: Mapping[str, Sequence[Any]], show: Callable[[str, Any], str]
) -> None:
    """A table of one row a key and one column a run; what a run has not is left blank."""
    if rows:
        cells = {name: ["" if v is None else show(name, v) for v in values] for name, values in rows.items()}
        print_table([title, *runs], [[name, *row] for name, row in cells.items()])
        print_line()


def _main_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in MAIN_METRICS if name in metrics}


def _yaml(value: Any) -> str:
    """A recipe's value as YAML writes it: null is a value too."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int) or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _cost_cell(name: str, value: float) -> str:
    if name.startswith("seconds"):
        return format_seconds(value)
    if name == "utilisation":
        return f"{value:.1%}"
    return format_bytes(value) if name.endswith("bytes") else _number(value)


def _date(text: str | None) -> str:
    """ISO 8601 as `03-04 09:12`, in local time; `--json` has the year and the zone."""
    return f"{datetime.fromisoformat(text).astimezone():%m-%d %H:%M}" if text else ""
