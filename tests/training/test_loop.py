"""The loop alone: which hooks run when, and what a stop leaves behind."""

from __future__ import annotations

from types import SimpleNamespace

from tunelab.training.loop import Hook, StopRequested, run_loop


def run(num_steps: int, *, hooks=(), stop_at: int | None = None, start: int = 0, stop_early_at: int | None = None):
    """A loop over a fake state; returns (events, finished)."""
    state = SimpleNamespace(step=start, stop_early=False)
    events: list[str] = []

    def step(state) -> None:
        state.step += 1
        state.stop_early = state.step == stop_early_at
        events.append(f"step {state.step}")

    finished = run_loop(
        state,
        num_steps=num_steps,
        step=step,
        hooks=[Hook(every, lambda state, name=name: events.append(f"{name} {state.step}")) for name, every in hooks],
        save=lambda state: events.append(f"save {state.step}"),
        stop_requested=lambda: state.step == stop_at,
    )
    return events, finished


def test_hooks_run_at_the_start_every_n_and_after_the_last() -> None:
    events, finished = run(5, hooks=[("eval", 2)])
    assert finished
    assert [e for e in events if e.startswith("eval")] == ["eval 0", "eval 2", "eval 4", "eval 5"]
    assert events[-1] == "save 5"


def test_hooks_of_one_step_run_in_the_order_given() -> None:
    events, _ = run(1, hooks=[("eval", 1), ("keep", 1)])
    assert events == ["eval 0", "keep 0", "step 1", "eval 1", "keep 1", "save 1"]


def test_a_requested_stop_saves_where_it_is() -> None:
    assert run(5, stop_at=3) == (["step 1", "step 2", "step 3", "save 3"], False)


def test_early_stopping_finishes_the_run_with_its_last_hooks() -> None:
    events, finished = run(9, hooks=[("eval", 4)], stop_early_at=3)
    assert finished
    assert events[-2:] == ["eval 3", "save 3"]


def test_a_finished_state_trains_no_further() -> None:
    assert run(4, start=4) == (["save 4"], True)


def test_a_hook_that_gives_up_is_followed_by_a_save() -> None:
    state = SimpleNamespace(step=2, stop_early=False)
    saved: list[int] = []

    def give_up(state) -> None:
        raise StopRequested

    finished = run_loop(
        state, num_steps=5, step=lambda state: None, hooks=[Hook(1, give_up)],
        save=lambda state: saved.append(state.step), stop_requested=lambda: False,
    )  # fmt: skip
    assert not finished
    assert saved == [2]
