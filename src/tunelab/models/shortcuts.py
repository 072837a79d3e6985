"""The engine's exact shortcuts, each of which can be switched off to measure what it brings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shortcuts:
    """Which shortcuts the packed layout takes. All compute the same numbers, to rounding of the products.

    fused_blocks: hand-written block functions instead of the model's own modules. prune_last_block: the last block's
    queries and MLP at loss positions only (fused blocks). gradient_in_forward: the output head's gradient while its
    logits are at hand, where it is known by then (see `logprobs.py`). float32_products: of weights that are stored in
    bf16, cast when they are multiplied, and a float32 residual stream (fused blocks).
    """

    fused_blocks: bool = True
    prune_last_block: bool = True
    gradient_in_forward: bool = True
    float32_products: bool = False


OWN_MODULES = Shortcuts(fused_blocks=False)
"""The model's own modules, on packed rows."""
