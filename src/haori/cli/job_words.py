"""Times of jobs in a few words."""

import time

__all__ = ["ago", "duration"]

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def duration(seconds: float) -> str:
    """Return a time in the two largest units that say something, like `2 h 5 min`."""
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def ago(moment: float) -> str:
    """Return how long ago a moment was (seconds since 1970)."""
    return f"{duration(max(0.0, time.time() - moment))} ago"
