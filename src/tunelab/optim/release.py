"""Gradient release: each weight is updated as soon as its gradient is there, and the gradient is freed.

Also called the optimizer in the backward pass (Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models
with Limited Resources", §3.1, fused update). The gradients alive at one time are then those that one autograd function
returns together (half a block), and that of a tied output head, which waits for the embedding's; not all of them.

It changes no number: where autograd has a parameter's gradient, every function that reads the parameter has run. But it
takes the gradients as they come, so nothing may need all of them first: no clipping by the global norm, no
accumulation over micro-batches, no loss scaler, no optimizer whose parameters depend on each other's gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class GradientRelease:
    """What became of the gradients of one backward pass.

    A gradient that is not finite never reaches a weight: from there on every update is withheld. `moved` counts the
    parameters updated, and `refused` is the first whose gradient was not finite.
    """

    def __init__(self, update: Callable[[nn.Parameter], None]) -> None:
        self._update = update
        self._norms: list[Tensor] = []
        self.moved = 0
        self.refused: nn.Parameter | None = None

    @contextmanager
    def catching(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Within the body, a backward pass hands each gradient of `parameters` to the update, and leaves none."""
        handles = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in parameters if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def grad_norm(self) -> Tensor:
        """2-norm of all gradients together, as if they had been there at one time."""
        return torch.linalg.vector_norm(torch.stack(self._norms))

    def _on_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad)
        self._norms.append(norm.float())
        if self.refused is None:
            if math.isfinite(norm.item()):
                self._update(parameter)
                self.moved += 1
            else:
                self.refused = parameter
        parameter.grad = None
