"""What a job's events become in the queue: lines and figures for its people, and its latest progress.

The steps of training go to `metrics.jsonl` in the run folder, every one of them. Here one a second is kept, and every
validation, each as a `metrics` event whose data is the event itself.
"""

import time
from typing import Any

from haori.core.events import Event, Measured, Progress, Said, Saved, Started, Warned
from haori.jobs.queue.event_log import NewEvent

__all__ = ["Report"]

_EVERY_S = 1.0


class Report:
    """Turns events of one attempt into those of the queue.

    Attributes:
        progress: The latest, as `Job.progress` holds it; None before the first step.
    """

    def __init__(self) -> None:
        self.progress: dict[str, Any] | None = None
        self._began: tuple[float, int] | None = None
        self._last = 0.0

    def take(self, events: list[Event]) -> list[NewEvent]:
        """Return what the queue is to keep of these."""
        return [new for event in events for new in self._one(event)]

    def _one(self, event: Event) -> list[NewEvent]:
        data = event.model_dump(mode="json", exclude_none=True)
        match event:
            case Progress():
                self._follow(event)
                if event.job is not None or time.monotonic() - self._last < _EVERY_S:
                    return []
                self._last = time.monotonic()
                said = f"Step {event.step} of {event.total_steps}: training loss {event.loss:.4g}"
                return [NewEvent("info", "metrics", said, data)]
            case Measured() if event.job is None:
                figures = ", ".join(f"{name} {value:.4g}" for name, value in event.values.items())
                return [NewEvent("info", "metrics", f"Step {event.step}: {figures}", data)]
            case Saved() if event.job is None:
                return [NewEvent("info", "message", f"Saved the {event.what} of step {event.step}.", data)]
            case Started() if event.job is None:
                how = f"goes on from step {event.step}" if event.step else "began"
                return [NewEvent("info", "message", f"The {event.work} {how}.", data)]
            case Warned():
                return [NewEvent("warn", "message", event.text)]
            case Said() if event.job is None:
                return [NewEvent("info", "message", event.text)]
        return []

    def _follow(self, event: Progress) -> None:
        now = time.monotonic()
        if self._began is None or event.step <= self._began[1]:
            self._began = (now, event.step)
        since, first = self._began
        left = None
        if event.step > first:
            left = round((now - since) / (event.step - first) * (event.total_steps - event.step), 1)
        self.progress = {
            "step": event.step, "of": event.total_steps, "epoch": event.epoch, "loss": event.loss,
            "seconds_left": left, "work": event.job,
        }  # fmt: skip
