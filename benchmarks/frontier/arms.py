"""The arms: every optimizer as a person would configure it, and where its learning rate is looked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["full", "lean", "part", "ours"]
Task = Literal["tune", "scratch", "smollm2"]
WIDTH = 256
"""Of the small model. Low-rank methods get a quarter of it, the share that GaLore's paper compares at (512 of 2048)."""


@dataclass(frozen=True)
class Arm:
    """`optimizer`: the recipe's section without its learning rate. `rates`: where the search begins, for fine-tuning
    the small model. `storage`: the recipe's `model.precision`.
    """

    label: str
    family: Family
    optimizer: dict[str, Any]
    rate: float
    storage: Literal["float32", "bf16-stored"] = "float32"
    releases: bool = False
    adapter: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def max_grad_norm(self) -> float | None:
        """The recipe's default; with gradient release there is no global norm."""
        return None if self.releases else 1.0


LEAN: dict[str, Any] = {"storage": "bf16-stored", "releases": True}
"""bf16 weights rounded stochastically, gradients released: 2 bytes a parameter beside the state."""

LOW_RANK = {"rank": WIDTH // 4, "update_proj_gap": 50}

ARMS: dict[str, Arm] = {
    "adamw": Arm("AdamW", "full", {"name": "adamw"}, 9.5e-4),
    "quarter": Arm("quarter", "ours", {"name": "quarter"}, 9.5e-4, **LEAN),
    "sgd": Arm("SGD", "lean", {"name": "sgd"}, 0.3),
    "momentum": Arm("momentum", "full", {"name": "sgd", "momentum": 0.9}, 0.03),
    "rmsprop": Arm("RMSprop", "full", {"name": "rmsprop"}, 3e-4),
    "adagrad": Arm("Adagrad", "full", {"name": "adagrad"}, 3e-3),
    "lion": Arm("Lion", "full", {"name": "lion"}, 1e-4),
    "adafactor": Arm("Adafactor", "lean", {"name": "adafactor"}, 9.5e-4),
    "sm3": Arm("SM3", "lean", {"name": "sm3"}, 3e-2),
    "came": Arm("CAME", "lean", {"name": "came"}, 3e-4),
    "adam_mini": Arm("Adam-mini", "lean", {"name": "adam_mini"}, 9.5e-4),
    "adamw_8bit": Arm("8-bit AdamW", "lean", {"name": "adamw_8bit"}, 9.5e-4),
    "muon": Arm("Muon", "full", {"name": "muon"}, 9.5e-4),
    "galore": Arm("GaLore", "part", {"name": "galore", **LOW_RANK}, 3e-3),
    "fira": Arm("Fira", "part", {"name": "fira", **LOW_RANK}, 3e-3),
    "apollo": Arm("APOLLO", "part", {"name": "apollo", **LOW_RANK}, 9.5e-4),
    "apollo_mini": Arm("APOLLO-Mini", "part", {"name": "apollo_mini", "update_proj_gap": 50}, 9.5e-4),
    "badam": Arm("BAdam", "part", {"name": "badam", "switch_every": 10}, 9.5e-4),
    "lisa": Arm("LISA", "part", {"name": "lisa", "lisa_interval_steps": 10}, 9.5e-4),
    "lomo": Arm("LOMO", "lean", {"name": "lomo"}, 0.3, releases=True),
    "adalomo": Arm("AdaLomo", "lean", {"name": "adalomo"}, 3e-2, releases=True),
    "schedule_free": Arm("schedule-free AdamW", "full", {"name": "schedule_free_adamw"}, 3e-3),
    "lora": Arm(
        "LoRA", "part", {"name": "adamw"}, 1e-2, adapter={"name": "lora", "r": 16, "target_modules": "all-linear"}
    ),
    "adafactor_lean": Arm("Adafactor, bf16, released", "lean", {"name": "adafactor"}, 9.5e-4, **LEAN),
    "lomo_lean": Arm("LOMO, bf16", "lean", {"name": "lomo"}, 0.3, **LEAN),
    "adalomo_lean": Arm("AdaLomo, bf16", "lean", {"name": "adalomo"}, 3e-2, **LEAN),
    "lion_lean": Arm("Lion, bf16, released", "lean", {"name": "lion"}, 1e-4, **LEAN),
    "adamw_8bit_lean": Arm("8-bit AdamW, bf16, released", "lean", {"name": "adamw_8bit"}, 9.5e-4, **LEAN),
}
