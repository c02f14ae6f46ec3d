"""Figures of a job's steps, as Together's client asks for them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from haori.jobs.queue.records import Job, JobEvent
from haori.jobs.queue.store import JobStore
from haori.server.errors import ApiError
from haori.server.together.job_events import every_event

__all__ = ["Chosen", "metrics_of"]


class Chosen(NamedTuple):
    """Which figures are wanted; None for all.

    Attributes:
        logged_from: Time by ISO 8601.
        resolution: How many figures of training steps, spread evenly.
    """

    step_from: int | None
    step_to: int | None
    logged_from: str | None
    logged_to: str | None
    resolution: int | None


def metrics_of(store: JobStore, job: Job, chosen: Chosen) -> list[dict[str, float]]:
    """Return figures by name, the earliest first: those of a training step, or those of a validation.

    Raises:
        ApiError: A bound is no time, or a resolution no number of figures.
    """
    earliest = _seconds(chosen.logged_from, "logged_at_from", -float("inf"))
    latest = _seconds(chosen.logged_to, "logged_at_to", float("inf"))
    if chosen.resolution is not None and chosen.resolution < 1:
        raise _wrong("resolution", chosen.resolution, "give 1 or more")
    found: list[dict[str, float]] = []
    for event in every_event(store, job.id, "metrics"):
        figures = _figures(event)
        step = figures["global_step"]
        if (chosen.step_from is None or step >= chosen.step_from) and (
            chosen.step_to is None or step <= chosen.step_to
        ):
            found += [figures] * (earliest <= event.at <= latest)
    return found if chosen.resolution is None else _spread(found, chosen.resolution)


def _figures(event: JobEvent) -> dict[str, float]:
    data = event.data or {}
    figures = {"global_step": data["step"], "epoch": data["epoch"], "logged_at": event.at}
    if data.get("kind") == "measured":
        values = {name: value for name, value in data["values"].items() if name != "train_loss"}
        figures |= {f"eval_{name}": value for name, value in values.items()}
    else:
        figures |= {"train_loss": data["loss"], **data.get("values", {})}
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}


def _spread(found: Sequence[dict[str, float]], count: int) -> list[dict[str, float]]:
    """Keep so many of the training steps, spread evenly with the first and the last, and every validation."""
    steps = [place for place, figures in enumerate(found) if "train_loss" in figures]
    if count < len(steps):
        last = len(steps) - 1
        steps = [steps[round(i * last / max(1, count - 1))] for i in range(count)]
    kept = set(steps)
    return [figures for place, figures in enumerate(found) if place in kept or "train_loss" not in figures]


def _seconds(given: str | None, name: str, default: float) -> float:
    if given is None:
        return default
    try:
        found = datetime.fromisoformat(given)
    except ValueError:
        raise _wrong(name, given, "give a time by ISO 8601, such as 2026-01-31T12:00:00Z") from None
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


def _wrong(name: str, given: object, what: str) -> ApiError:
    return ApiError(400, f"{name!r} cannot be {str(given)[:60]!r}; {what}.", param=name, code="invalid_value")
