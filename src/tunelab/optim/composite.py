"""Several optimizers as one."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Composite(torch.optim.Optimizer):
    """`parts` by the `kind` of the groups they update: one list of groups, one state, one step.

    A part keeps its own hyperparameters in its groups, and these are the groups here. At each step it is handed those
    of its kind that are here now: whoever lends this optimizer other groups lends them to the parts.
    """

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts.values() for group in part.param_groups], {})
        self.parts = dict(parts)
        for part in self.parts.values():
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for kind, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if group["kind"] == kind]
            part.step()
