"""How a tied output head and the embedding of the same weight share one gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class TiedGradient:
    """Where the output head leaves its (V, D) gradient for the embedding of the same weight to add its rows to.

    Autograd would make a second dense gradient for the embedding's few rows, and add the two. The embedding is upstream
    of the head, so its backward pass always comes later; it returns the sum (`fused/embedding.py`).
    """

    value: Tensor | None = None
