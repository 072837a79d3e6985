"""The peer's arms: which of its flags are set beyond the rules both sides share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.jobs import Work
from benchmarks.workloads import Mix, Order


@dataclass(frozen=True)
class PeerArm:
    """Flags of TRL's config (or of `generate`), and the order of the examples: on both sides, so that the losses can
    be compared. `says` is for the table."""

    name: str
    says: str
    order: Order = "sequential"
    flags: dict[str, Any] = field(default_factory=dict)


DEFAULTS = PeerArm("defaults", "defaults")
GROUPED = PeerArm("grouped", "length grouping", order="grouped")
PADDING_FREE = PeerArm("padding-free", "padding_free", flags={"padding_free": True})
PRECOMPUTED = PeerArm(
    "precomputed",
    "precompute_ref_log_probs, length grouping",
    order="grouped",
    flags={"precompute_ref_log_probs": True},
)
SMALL_BATCHES = PeerArm(
    "small-batches",
    "micro-batches of one, accumulated",
    flags={"per_device_train_batch_size": 1, "gradient_accumulation_steps": "all"},
)
"""Nothing to pad, and little memory. `all`: as many as a step has examples."""
STATIC = PeerArm("static", "static cache", flags={"cache_implementation": "static"})
UNCHECKPOINTED = {"gradient_checkpointing": False}
"""On a card TRL checkpoints activations by default; where there is memory, the best flags do not."""


WANTED = ("defaults", "best", "small-batches")
ONE_OF_THE_BEST = ("grouped", "padding-free")
"""Arms of SFT and LoRA that `best` would measure together."""


def peer_arms(work: Work, wanted: str, device: str, mix: Mix | None = None) -> list[PeerArm]:
    """The arms that one of WANTED stands for; `best` may be several. Equal lengths need no grouping."""
    if wanted == "defaults":
        return [DEFAULTS]
    if work == "generate":
        return [STATIC] if wanted == "best" else []
    named = {arm.name: arm for arm in (SMALL_BATCHES, GROUPED, PADDING_FREE)}
    if wanted in named:
        arms = [named[wanted]]
    elif work == "dpo":
        arms = [PRECOMPUTED]
    else:
        arms = [PADDING_FREE] if mix == "equal" else [GROUPED, PADDING_FREE]
    if device == "cpu":
        return arms
    return [PeerArm(arm.name, arm.says, arm.order, arm.flags | UNCHECKPOINTED) for arm in arms]
