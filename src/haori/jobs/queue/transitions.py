"""What people may ask of a job in each state, and what that makes of it."""

import time
from typing import Any, Literal, NamedTuple

from haori.core.errors import InputError
from haori.jobs.queue.records import Job

__all__ = ["Action", "Transition", "transition"]

Action = Literal["cancel", "pause", "resume", "retry"]


class Transition(NamedTuple):
    """Columns to change, and the event that says so; neither if the job is so already."""

    values: dict[str, Any]
    message: str


def transition(job: Job, action: Action) -> Transition:
    """Return what an action makes of a job. A running one is only asked to stop, upon which its worker ends it.

    Raises:
        InputError: It cannot be done in the job's state.
    """
    now = time.time()
    found: dict[tuple[Action, str], Transition] = {
        ("cancel", "queued"): Transition({"state": "cancelled", "ended": now}, "The job was cancelled."),
        ("cancel", "paused"): Transition({"state": "cancelled", "ended": now}, "The job was cancelled."),
        ("cancel", "running"): Transition({"cancel": True}, "The job is asked to stop."),
        ("cancel", "cancelled"): Transition({}, ""),
        ("pause", "queued"): Transition({"state": "paused", "pause": True}, "The job was paused."),
        ("pause", "running"): Transition({"pause": True}, "The job is asked to save and pause."),
        ("pause", "paused"): Transition({}, ""),
        ("resume", "paused"): Transition(
            {"state": "queued", "pause": False, "not_before": 0.0}, "The job waits again."
        ),
        ("resume", "running"): Transition({"pause": False}, "The job goes on."),
        ("resume", "queued"): Transition({}, ""),
    }
    again = {
        "state": "queued", "attempts": 0, "cancel": False, "pause": False, "error": None, "ended": None,
        "not_before": 0.0, "progress": None,
    }  # fmt: skip
    for state in ("failed", "cancelled"):
        found["retry", state] = Transition(again, "The job is tried again.")
    if (action, job.state) not in found:
        allowed = " or ".join(state for name, state in found if name == action)
        raise InputError(f"The job {job.id!r} is {job.state}, so it cannot be made to {action}; {allowed} jobs can.")
    return found[action, job.state]
