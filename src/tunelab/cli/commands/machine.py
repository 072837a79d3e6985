"""`tunelab doctor`."""

from __future__ import annotations

import typer

from tunelab.cli.options import Json, RunsDir
from tunelab.cli.output import paint, print_json, print_line, wrap
from tunelab.errors import EXIT_ENVIRONMENT

STYLES = {"ok": "32", "warn": "33", "fail": "31;1"}


def doctor(runs_dir: RunsDir = "runs", json: Json = False) -> None:
    """\b
    Example: tunelab doctor

    Python, packages, device, threads, memory, disk, cached models and extras: what is there, and for what is missing,
    the mend. Exits with 4 if something fails.
    """
    from tunelab.doctor import examine

    checks = examine(runs_dir)
    failed = any(check.status == "fail" for check in checks)
    if json:
        print_json({"ok": not failed, "checks": [check.to_json() for check in checks]})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            text = f"{check.status.ljust(4)}  {check.name.ljust(width)}  {check.found}"
            first, *rest = wrap(text + (f" → {check.mend}" if check.mend else ""), indent=width + 8)
            print_line(first.replace(check.status, paint(check.status, STYLES[check.status]), 1))
            for line in rest:
                print_line(line)
    if failed:
        raise typer.Exit(EXIT_ENVIRONMENT)
