"""Speed and memory of tunelab's engine against named peers. `python -m benchmarks --help`; rules in README.md here.

This package runs in two environments, tunelab's own and the peer's: only `arms/tunelab_arm.py`, `workloads.py` and
`floors.py` import tunelab, only `arms/trl_arm.py` imports TRL, and nothing is imported that a side does not need.
"""
