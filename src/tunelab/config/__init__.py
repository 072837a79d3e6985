"""Recipes: what a run is, as frozen data."""

from tunelab.config.loading import load_recipe, parse_recipe
from tunelab.config.schema import (
    AdamConfig,
    AdamWConfig,
    AdapterConfig,
    DataConfig,
    DPOConfig,
    EvaluationConfig,
    LoRAConfig,
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
    "AdapterConfig",
    "DPOConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoRAConfig",
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
