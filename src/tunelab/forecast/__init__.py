"""What a run will take, before it is paid: memory by part, FLOPs, tokens, time, disk.

    run_forecast(plan, target)      # a plan is a recipe checked against its data; no weights are read

A run records its forecast beside what it measured; `tunelab plan` and `--dry-run` (planner.py) print it.
"""

from tunelab.forecast.run import SCHEMA_VERSION, run_forecast
from tunelab.forecast.target import Target, detect_target

__all__ = ["SCHEMA_VERSION", "Target", "detect_target", "run_forecast"]
