"""The loop. It knows steps, hooks and stopping, and nothing of methods, models or files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunelab.training.state import TrainState


@dataclass(frozen=True)
class Hook:
    """Something done after every `every`-th step, and after the last. Hooks run in the order given."""

    every: int
    call: Callable[[TrainState], None]

    def is_due(self, step: int, last: bool) -> bool:
        return last or step % self.every == 0


class StopRequested(Exception):  # noqa: N818  (a request, not an error)
    """Raised by a hook that gave up midway because a stop was asked for; the loop saves and leaves."""


def run_loop(
    state: TrainState,
    *,
    num_steps: int,
    step: Callable[[TrainState], None],
    hooks: Sequence[Hook],
    save: Callable[[TrainState], None],
    stop_requested: Callable[[], bool],
) -> bool:
    """Train from `state.step` to `num_steps`, or until `state.stop_early` or a requested stop.

    `step` does one optimizer step and advances the counters. Returns True if the run is finished, False if it was
    stopped on request; the state is saved before returning either way by `save` (the last hooks have run if finished).
    """
    while True:
        try:
            for hook in hooks:
                if hook.is_due(state.step, last=state.step >= num_steps or state.stop_early):
                    hook.call(state)
        except StopRequested:
            save(state)
            return False
        if state.step >= num_steps or state.stop_early:
            save(state)
            return True
        if stop_requested():
            save(state)
            return False
        step(state)
