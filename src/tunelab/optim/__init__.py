"""How weights move: parameter groups, optimizers, learning-rate schedules."""

from tunelab.optim.build import build_optimizer, check_optimizer, optimizer_note
from tunelab.optim.groups import ParameterRoles, parameter_groups
from tunelab.optim.library import to_evaluation, to_training
from tunelab.optim.sampling import LayerSampler, build_sampler
from tunelab.optim.schedules import Schedule, build_schedule
from tunelab.optim.updates import Updates

__all__ = [
    "LayerSampler",
    "ParameterRoles",
    "Schedule",
    "Updates",
    "build_optimizer",
    "build_sampler",
    "build_schedule",
    "check_optimizer",
    "optimizer_note",
    "parameter_groups",
    "to_evaluation",
    "to_training",
]
