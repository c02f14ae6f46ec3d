"""How much of the machine training takes while requests are answered beside it."""

import time
from collections.abc import Callable

from haori.core.errors import InputError

__all__ = ["TrainShare"]

_SLICE_S = 0.02  # how soon training goes on once the last request has ended


class TrainShare:
    """Rests between micro-batches while requests are under way, so that training takes a share of the time at most.

    A micro-batch of t seconds is followed by a rest of t (1 - share) / share seconds; the rest ends when no request is
    under way any more. With nobody to wait for, training takes the whole machine.

    Args:
        share: Of the time, above 0 and at most 1; 1 never rests.
        is_serving: Whether requests are under way.

    Raises:
        InputError: The share is out of range.
    """

    def __init__(self, share: float, is_serving: Callable[[], bool]) -> None:
        if not 0.0 < share <= 1.0:
            raise InputError(f"The share of training is {share}; give a number above 0 and at most 1.")
        self.share = share
        self._is_serving = is_serving
        self.rested_s = 0.0

    def rest(self, worked_s: float, stop: Callable[[], bool]) -> None:
        """Rest after so many seconds of work, until `stop` says to go on."""
        if self.share == 1.0 or not self._is_serving():
            return
        begun = time.monotonic()
        until = begun + worked_s * (1.0 - self.share) / self.share
        while (left := until - time.monotonic()) > 0 and self._is_serving() and not stop():
            time.sleep(min(left, _SLICE_S))
        self.rested_s += time.monotonic() - begun
