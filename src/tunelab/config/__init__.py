"""Recipes: what a run is, as frozen data."""

from tunelab.config.loading import load_recipe, parse_recipe
from tunelab.config.schema import (
    AdamConfig,
    AdamWConfig,
    DataConfig,
    DPOConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    SFTConfig,
    SGDConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "AdamConfig",
    "AdamWConfig",
    "DPOConfig",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Recipe",
    "SFTConfig",
    "SGDConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainingConfig",
    "load_recipe",
    "parse_recipe",
]
