"""bf16 as a storage of weights, whatever the optimizer: it sees float32, and what it leaves is rounded stochastically.

A bf16 weight keeps 8 significant bits. Rounded to nearest, an update below 2⁻⁹ of its weight leaves it where it was,
every time; and an update of fine-tuning is about the learning rate, 2e-5, beside weights of 2e-2. Rounded
stochastically it moves the weight by a whole step of the storage with the probability that makes the mean right
(`rounding.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tunelab.optim.rounding import stochastic_round


@contextmanager
def lent_as_float32(parameter: nn.Parameter, generator: torch.Generator) -> Iterator[None]:
    """Within the body `parameter` is float32, as is its gradient; afterwards it is bf16 again, rounded stochastically.

    It stays the same object, so that an optimizer finds its state, which is then float32 too; and the same memory holds
    the bf16 weights before and after. Its gradient is gone afterwards. Takes 8 bytes a weight of this one parameter
    meanwhile. If the body raises, the parameter is what it was.
    """
    stored, gradient = parameter.data, parameter.grad
    parameter.grad = None
    parameter.data = stored.float()
    if gradient is not None:
        parameter.grad = gradient.float()
        del gradient
    try:
        yield
        stored.copy_(stochastic_round(parameter.data, generator))
    finally:
        parameter.grad = None
        parameter.data = stored
