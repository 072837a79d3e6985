"""The two sides. Each runs in a fresh process: `python -m benchmarks.arms.NAME_arm JOB.json RESULT.json`."""
