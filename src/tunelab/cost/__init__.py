"""What a run costs: FLOPs by formula, tokens per second by the clock."""

from tunelab.cost.flops import (
    ModelShape,
    attention_pairs,
    classic_training_flops,
    inference_flops,
    training_flops,
)
from tunelab.cost.meters import ThroughputMeter

__all__ = [
    "ModelShape",
    "ThroughputMeter",
    "attention_pairs",
    "classic_training_flops",
    "inference_flops",
    "training_flops",
]
