"""The texts of requests on their way through the embedder."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from haori.core.errors import HaoriError
from haori.serve.models.encoder import Row
from haori.serve.request import AdapterMix

__all__ = ["Job", "JobText"]

_NOT_NUMBERS = "What was computed for this request are not numbers; its adapter or strength may be at fault."

R = TypeVar("R")


class Job(Generic[R]):
    """The texts of one request.

    Args:
        rows: The texts.
        mix: The adapters that act on them.
        answer: Makes the answer from what was computed for each text, and how many tokens each has.
    """

    def __init__(
        self, rows: Sequence[Row], mix: AdapterMix, answer: Callable[[list[list[float]], list[int]], R]
    ) -> None:
        self.rows = rows
        self.mix = mix
        self.future: Future[R] = Future()
        self.left = deque(range(len(rows)))
        self.began = time.monotonic()
        self._answer = answer
        self._computed: dict[int, list[float]] = {}

    @property
    def cancelled(self) -> bool:
        """Whether its caller has cancelled it."""
        return self.future.cancelled()

    def take(self, index: int, numbers: list[float]) -> None:
        """Take what was computed for one text."""
        if not math.isfinite(sum(numbers)):
            self.fail(HaoriError(_NOT_NUMBERS))
            return
        self._computed[index] = numbers
        if len(self._computed) == len(self.rows) and self._may_end():
            computed = [self._computed[i] for i in range(len(self.rows))]
            self.future.set_result(self._answer(computed, [len(row.ids) for row in self.rows]))

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        self.left.clear()
        if self._may_end():
            known = isinstance(error, HaoriError)
            done = "classified" if self.rows[0].classify else "embedded"
            sentence = f"The texts could not be {done} ({type(error).__name__}: {error})."
            self.future.set_exception(error if known else HaoriError(sentence))

    def _may_end(self) -> bool:
        return not self.future.done() and self.future.set_running_or_notify_cancel()


@dataclass(frozen=True, eq=False)
class JobText:
    """One text of a job."""

    job: "Job[object]"
    index: int

    @property
    def row(self) -> Row:
        """Its tokens and adapters."""
        return self.job.rows[self.index]

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.row.ids)

    @property
    def wanted(self) -> bool:
        """Whether it is still to be computed."""
        return not self.job.future.done()
