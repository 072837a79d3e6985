"""What a run costs: FLOPs and memory by formula, tokens per second by the clock, and the machine's own speed."""

from tunelab.cost.ceiling import matmul_ceiling
from tunelab.cost.floor import FloorFormula, floor_flops, floor_formula, predictor_counts
from tunelab.cost.flops import (
    attention_pairs,
    classic_training_flops,
    inference_flops,
    training_flops,
)
from tunelab.cost.memory import MemoryFloor, floor_memory
from tunelab.cost.meters import ThroughputMeter
from tunelab.cost.shape import Block, ModelShape, Projection

__all__ = [
    "Block",
    "FloorFormula",
    "MemoryFloor",
    "ModelShape",
    "Projection",
    "ThroughputMeter",
    "attention_pairs",
    "classic_training_flops",
    "floor_flops",
    "floor_formula",
    "floor_memory",
    "inference_flops",
    "matmul_ceiling",
    "predictor_counts",
    "training_flops",
]
