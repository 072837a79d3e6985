"""Updates of one parameter at a time by an optimizer that was made for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class SingleSteps:
    """`step(parameter)` moves that parameter alone; `settle()` ends a step in which each had its turn.

    The optimizer is lent one group that holds one parameter. What it keeps by parameter lies in its `state` as ever.
    What it counts by group (a step number, schedule-free's sum of weights) it counts in the group it is lent, from
    where the real group stands, and so comes to the same for every parameter of it; `settle` takes that over once. An
    optimizer whose update of one parameter depends on the gradients of others cannot be used so.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._places = {
            id(parameter): (number, place)
            for number, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])
        }
        self._advanced: dict[int, dict[str, Any]] = {}

    def step(self, parameter: nn.Parameter) -> None:
        """One update of `parameter` from its gradient. Raises KeyError if it is none of the optimizer's."""
        groups = self.optimizer.param_groups
        number, place = self._places[id(parameter)]
        alone = {**groups[number], "params": [parameter]}
        if "names" in alone:
            alone["names"] = [alone["names"][place]]
        self.optimizer.param_groups = [alone]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        self._advanced[number] = {key: value for key, value in alone.items() if key not in ("params", "names")}

    def settle(self) -> None:
        for number, values in self._advanced.items():
            self.optimizer.param_groups[number].update(values)
        self._advanced.clear()
