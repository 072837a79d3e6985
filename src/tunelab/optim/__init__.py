"""How weights move: parameter groups, optimizers, learning-rate schedules."""

from tunelab.optim.build import build_optimizer
from tunelab.optim.groups import parameter_groups
from tunelab.optim.schedules import Schedule, build_schedule

__all__ = ["Schedule", "build_optimizer", "build_schedule", "parameter_groups"]
