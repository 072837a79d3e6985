"""The page that shows what a run did, and the comparison of runs behind `tunelab runs`. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunelab.runs import RunFolder


def write_report(run: RunFolder, previous: Sequence[RunFolder] = ()) -> Path:
    """Write `report.html` into the run's folder and return its path; see `page.write_report`.

    `previous` are the runs this one started from, first stage first: they become earlier stages on the same page.
    """
    from tunelab.report import page  # brings matplotlib, half a second that `tunelab runs` need not wait for

    return page.write_report(run, previous)
