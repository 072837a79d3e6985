"""What a side is told to do and what it answers. Standard library only: both environments read this."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Work = Literal["sft", "lora", "dpo", "generate"]
Side = Literal["tunelab", "trl"]

BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.0
MAX_GRAD_NORM = 1.0
DPO_BETA = 0.1
LORA_RANK = 8
LORA_ALPHA = 16
LEARNING_RATES: dict[str, float] = {"sft": 2e-5, "lora": 2e-4, "dpo": 5e-6}
"""Large enough for a wrong gradient to show in the loss curve within a few steps."""


@dataclass(frozen=True)
class Job:
    """One measurement in one process.

    `model` is a Hugging Face folder, `examples` a file of `write_examples`; `steps` optimizer steps take `batch_size`
    examples each, in the file's order. `options` are the peer's flags beyond the rules all arms share; for `generate`
    they hold `new_tokens`.
    """

    work: Work
    side: Side
    model: str
    examples: str
    batch_size: int
    steps: int
    threads: int
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["float32", "bf16"] = "float32"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for equal work: names the file of a finished repeat."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class TokenExample:
    """A prompt and the completions that continue it: one for SFT, (chosen, rejected) for DPO, none to generate from.

    Loss is on every completion token.
    """

    prompt: list[int]
    completions: list[list[int]]

    @property
    def real_tokens(self) -> int:
        """Without padding, the prompt once: what has to be computed, and the unit of tokens/s on both sides."""
        return len(self.prompt) + sum(map(len, self.completions))


def write_examples(path: Path, examples: list[TokenExample]) -> None:
    path.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples))


def read_examples(path: str | Path) -> list[TokenExample]:
    return [TokenExample(**json.loads(line)) for line in Path(path).read_text().splitlines()]
