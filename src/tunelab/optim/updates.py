"""How an optimizer's updates reach the weights, in one place for the training step.

updates.begin(step, learning_rate)       # learning rates, and which parameters train now
with updates.during_backward(): …        # with gradient release the updates happen here
updates.finish()                         # without it, here
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tunelab.optim.release import GradientRelease
from tunelab.optim.rounding import generator_for
from tunelab.optim.sampling import LayerSampler
from tunelab.optim.single import SingleSteps
from tunelab.optim.storage import lent_as_float32


class Updates:
    """The updates of one optimizer.

    releases: in the backward pass, see `release.py`. rounding_seed: bf16 parameters are lent as float32 and rounded
    stochastically, see `storage.py`; the random bits are a function of (seed, step, parameter number), so that nothing
    of them need be saved. None leaves bf16 parameters to the optimizer. sampler: which parameters train at which step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        releases: bool = False,
        rounding_seed: int | None = None,
        sampler: LayerSampler | None = None,
    ) -> None:
        self.optimizer, self.releases, self.sampler = optimizer, releases, sampler
        self.rounding_seed = rounding_seed
        self.release: GradientRelease | None = None
        self._single = SingleSteps(optimizer)
        self._numbers = {id(parameter): number for number, parameter in enumerate(self.parameters())}
        self._step = -1

    def parameters(self) -> list[nn.Parameter]:
        """In the order of their numbers, which are those of the optimizer's saved state."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def begin(self, step: int, learning_rate: float) -> None:
        """Before the forward pass of `step` (from 0). A group learns at `learning_rate` times its own `lr_scale`, 1
        where it has none (LoRA+ sets it).
        """
        self._step = step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if self.sampler is not None:
            self.sampler.choose(step, self.optimizer)

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Around the step's one backward pass with gradient release; around each without, where it does nothing."""
        if not self.releases:
            yield
            return
        self.release = GradientRelease(self._update_one)
        with self.release.catching(self.parameters()):
            yield

    def gradients(self) -> list[Tensor]:
        """Those that are there now."""
        return [parameter.grad for parameter in self.parameters() if parameter.grad is not None]

    def grad_norm(self) -> Tensor:
        """2-norm of the step's gradients, after its backward passes."""
        if self.release is not None:
            return self.release.grad_norm()
        return torch.nn.utils.get_total_norm(self.gradients())

    def finish(self) -> None:
        """Make the updates that are still to be made, and free the gradients."""
        if self.release is not None:
            self._single.settle()
            self.release = None
        elif any(self._is_lent(parameter) for parameter in self.parameters()):
            for parameter in self.parameters():
                if parameter.grad is not None:
                    self._update_one(parameter)
                    parameter.grad = None
            self._single.settle()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _update_one(self, parameter: nn.Parameter) -> None:
        if not self._is_lent(parameter):
            self._single.step(parameter)
            return
        assert self.rounding_seed is not None
        generator = generator_for(parameter.device, self.rounding_seed, self._step, self._numbers[id(parameter)])
        with lent_as_float32(parameter, generator):
            self._single.step(parameter)

    def _is_lent(self, parameter: nn.Parameter) -> bool:
        # An optimizer that says so rounds for itself (`quarter.py`).
        rounds_itself = getattr(self.optimizer, "rounds_stochastically", False)
        return self.rounding_seed is not None and parameter.dtype == torch.bfloat16 and not rounds_itself
