"""What a run costs: FLOPs and memory by formula, tokens per second by the clock, and the machine's own speed."""

from tunelab.cost.activations import Items, Path
from tunelab.cost.ceiling import matmul_ceiling
from tunelab.cost.floor import FloorFormula, Pass, floor_flops, floor_formula, predictor_counts
from tunelab.cost.flops import (
    attention_pairs,
    classic_training_flops,
    inference_flops,
    training_flops,
)
from tunelab.cost.memory import MemoryFloor, floor_memory
from tunelab.cost.meters import ThroughputMeter
from tunelab.cost.moments import PARTS, Generation, Moment, Training, Workload, memory_moments, peak
from tunelab.cost.parameters import Weight, read_weights
from tunelab.cost.rows import Row
from tunelab.cost.shape import Block, ModelShape, Projection

__all__ = [
    "PARTS",
    "Block",
    "FloorFormula",
    "Generation",
    "Items",
    "MemoryFloor",
    "ModelShape",
    "Moment",
    "Pass",
    "Path",
    "Projection",
    "Row",
    "ThroughputMeter",
    "Training",
    "Weight",
    "Workload",
    "attention_pairs",
    "classic_training_flops",
    "floor_flops",
    "floor_formula",
    "floor_memory",
    "inference_flops",
    "matmul_ceiling",
    "memory_moments",
    "peak",
    "predictor_counts",
    "read_weights",
    "training_flops",
]
