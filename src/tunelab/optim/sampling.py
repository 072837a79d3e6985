"""Layers take turns: only some of a model's weights train at a time, and only those have gradients and state.

LISA (Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
algorithm 1): what lies outside the layers trains always, and with it a few layers drawn anew every K steps. Its memory
is to be that of the layers that train now, so the state of a layer that is frozen is dropped.

BAdam (Luo et al. 2024, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
algorithm 1): one block at a time for K steps of Adam that start from no state; once all had their turn, a new round.

Which layers train at a step is a function of (seed, step) alone, so a resumed run chooses as the unbroken one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from tunelab.config.optimizers import BAdamConfig, LISAConfig
from tunelab.errors import ConfigError

Block = list[nn.Parameter]

BADAM_SWITCH_EVERY = 100
"""The authors' K, and the most that they advise (README of badam 1.4); fewer where a run is too short for a round."""


class LayerSampler(ABC):
    """Which of `blocks` train at which step. Parameters outside them are left as they are."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)

    @abstractmethod
    def active(self, step: int) -> frozenset[int]:
        """The blocks that train at `step` (from 0)."""

    def starts_anew(self, step: int) -> bool:
        """Whether the state of every block is dropped before `step`, also that of one that trains on."""
        return False

    def choose(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Let the blocks of `step` require gradients and no others, and free the optimizer's state of the others."""
        active = self.active(step)
        for number, block in enumerate(self.blocks):
            for parameter in block:
                parameter.requires_grad_(number in active)
                if number not in active or self.starts_anew(step):
                    optimizer.state.pop(parameter, None)


class LISASampler(LayerSampler):
    """`count` layers drawn uniformly for each period of `interval` steps."""

    def __init__(self, blocks: Sequence[Block], count: int, interval: int, seed: int) -> None:
        super().__init__(blocks)
        self.count, self.interval, self.seed = count, interval, seed

    def active(self, step: int) -> frozenset[int]:
        return frozenset(_order(len(self.blocks), self.seed, step // self.interval)[: self.count])


class BAdamSampler(LayerSampler):
    """One block for `switch_every` steps each; every round visits all, in its own order if `order` is random."""

    def __init__(self, blocks: Sequence[Block], switch_every: int, order: str, seed: int) -> None:
        super().__init__(blocks)
        self.switch_every, self.order, self.seed = switch_every, order, seed

    def active(self, step: int) -> frozenset[int]:
        number, place = divmod(step // self.switch_every, len(self.blocks))
        turns = list(range(len(self.blocks)))
        if self.order == "random":
            turns = _order(len(self.blocks), self.seed, number)
        elif self.order == "descending":
            turns.reverse()
        return frozenset([turns[place]])

    def starts_anew(self, step: int) -> bool:
        return step % self.switch_every == 0


def build_sampler(
    config: LISAConfig | BAdamConfig,
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    num_steps: int,
    seed: int,
) -> LayerSampler:
    """The sampler of `config` for the trainable parameters of `model`, whose blocks are `layers`, lowest first.

    Layers without trainable parameters take no part. BAdam freezes for good what is in no block: the embeddings and,
    with the final norm, the output head, unless it is told to include them. Raises ConfigError where there is nothing
    to choose from.
    """
    inside = [block for block in (_trainable(layer) for layer in layers) if block]
    if not inside:
        raise ConfigError(
            f"optimizer.name: {config.name} trains layers in turn, and none of them is trainable here; use adamw"
        )
    if isinstance(config, LISAConfig):
        if config.lisa_activated_layers > len(inside):
            raise ConfigError(
                f"optimizer.lisa_activated_layers: {config.lisa_activated_layers} is more than the {len(inside)} "
                "layers that can train; use fewer"
            )
        return LISASampler(inside, config.lisa_activated_layers, config.lisa_interval_steps, seed)

    taken = {id(parameter) for block in inside for parameter in block}
    embeddings, rest = _outside(model, taken)
    blocks = [*([embeddings] if config.include_embedding else []), *inside, *([rest] if config.include_lm_head else [])]
    blocks = [block for block in blocks if block]
    frozen = ([] if config.include_embedding else embeddings) + ([] if config.include_lm_head else rest)
    for parameter in frozen:
        parameter.requires_grad_(False)
    switch_every = config.switch_every or max(1, min(BADAM_SWITCH_EVERY, num_steps // len(blocks)))
    return BAdamSampler(blocks, switch_every, config.switch_mode, seed)


def _trainable(module: nn.Module) -> Block:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _outside(model: nn.Module, inside: set[int]) -> tuple[Block, Block]:
    """Trainable parameters outside the layers: of embeddings (a tied output head is one), and all others."""
    outside = [parameter for parameter in _trainable(model) if id(parameter) not in inside]
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return [p for p in outside if id(p) in tables], [p for p in outside if id(p) not in tables]


def _order(count: int, seed: int, period: int) -> list[int]:
    """A permutation of 0 … count−1, fixed by the arguments on every version of numpy (as in `data/loader.py`)."""
    words = np.random.Philox(key=np.array([seed, period], np.uint64)).random_raw(count)
    return [int(index) for index in np.argsort(words, kind="stable")]
