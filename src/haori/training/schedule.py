"""The learning rate at each step: a pure function, so that a resumed run needs no scheduler state."""

import math

from haori.tasks.recipe import ScheduleSection

__all__ = ["rate_at"]


def rate_at(step: int, total: int, peak: float, schedule: ScheduleSection) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total`.

    It rises linearly over the first `warmup_ratio` of the steps, then stays (`constant`), falls linearly, or falls
    as half a cosine, towards 0 after the last step.
    """
    warmup = math.ceil(schedule.warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    return peak * (1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
