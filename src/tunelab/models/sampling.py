"""From logits to the next token: penalties, filters and draws, each as transformers defines it.

B sequences, V vocabulary. Pure functions of tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunelab.errors import ConfigError


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue a prompt.

    `temperature` 0 takes the likeliest token. `top_k` keeps that many tokens, `top_p` the smallest set of likeliest
    tokens whose probability reaches it (Holtzman et al. 2020, eq. 2), after top-k. `repetition_penalty` divides the
    positive and multiplies the negative logits of tokens already seen (Keskar et al. 2019, §4.1). `stop`: generation
    ends when one of these strings appears. `batch_size` prompts are computed together; it changes no result.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "finite and not negative")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        penalty = self.repetition_penalty
        _require(0 < penalty < math.inf, "repetition_penalty", penalty, "finite and above 0 (1: none)")
        _require(self.seed >= 0, "seed", self.seed, "not negative")
        _require(all(self.stop), "stop", self.stop, "free of empty strings")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise ConfigError("generation: top_k and top_p are read only while sampling; set temperature above 0")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"generation: {name} is {value!r} and must be {expected}")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits: (B, V); seen: (B, V) bool, the tokens of the prompt and of what was generated."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def filter_logits(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Logits of the distribution to draw from, (B, V): scaled, and −inf at what top-k and top-p leave out."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = torch.topk(logits, top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ascending, order = torch.sort(logits)
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        removed[:, -1] = False  # the likeliest token stays whatever its probability
        logits = logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    return logits


def draw(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token a row by inversion of its distribution function: (B,) int64. logits: (B, V), on the CPU.

    Row b uses one uniform number of `generators[b]`, so that it draws the same whoever shares its batch, and on every
    device.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    uniform = torch.stack([torch.rand(1, generator=generator, dtype=torch.float32) for generator in generators])
    # float32 uniforms stop at 1 − 2⁻²⁴: scaled in float64 they stay below the total, so the search ends on a token
    # of positive probability (`right`: the first whose cumulative probability exceeds the number).
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)


def row_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of prompt `index`: independent streams for every (seed, index)."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
