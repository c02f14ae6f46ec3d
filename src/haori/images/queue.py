"""A queue in front of a generator: one drawing at a time on a thread of its own, in turns by owner, with progress.

A drawing is a job of one or more rounds; the pictures of a round are drawn in batches. A job that is cancelled draws no
further step, and neither waits nor runs any more.
"""

import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from haori.core.errors import HaoriError, OverloadedError, UnavailableError
from haori.images.generation import DrawnPicture, StepsDone
from haori.images.request import PictureRequest

__all__ = ["PictureJob", "PictureQueue", "Progress"]

Round = tuple[PictureRequest, ...]
_RETRY_S = 5.0
_ENDED = "The server ended before the picture was complete; ask again."


class Draws(Protocol):
    """What draws: a `PictureGenerator`."""

    def draw(
        self, requests: Sequence[PictureRequest], on_step: Callable[[StepsDone], None] | None = None
    ) -> list[DrawnPicture]:
        """Draw the pictures of requests, in their order."""


class _StoppedError(Exception):
    """A round is not to go on."""


@dataclass(eq=False)
class PictureJob:
    """What one owner asked for together.

    Attributes:
        owner: Whose it is.
        rounds: The pictures of each round.
        steps: Of all rounds.
        pictures: Gives the pictures, once all are drawn; fewer if it was interrupted or a round was skipped.
        done: Steps that are done.
        round: The round that runs.
        started_s: When it began, by the monotonic clock.
        interrupted: It ends after what is drawn already.
        skipped: Number of rounds that were left in the middle.
    """

    owner: str
    rounds: tuple[Round, ...]
    steps: int
    pictures: "Future[list[DrawnPicture]]" = field(default_factory=Future)
    done: int = 0
    round: int = 0
    started_s: float = 0.0
    interrupted: bool = False
    skipped: int = 0
    _cancelled: bool = False
    _skip: bool = False


class Progress(NamedTuple):
    """How far the work of an owner is; all zero if there is none.

    Attributes:
        share: Of the steps of the job that runs, 0 to 1.
        left_s: Seconds until it is done, about.
        rounds: That run or wait, in all jobs.
        round: That runs, of its job.
        step: Steps done of the job that runs.
        steps: All of its steps.
        waiting: Jobs that wait.
        interrupted: The job that runs is about to end.
    """

    share: float = 0.0
    left_s: float = 0.0
    rounds: int = 0
    round: int = 0
    step: int = 0
    steps: int = 0
    waiting: int = 0
    interrupted: bool = False


class PictureQueue:
    """Jobs for one generator; every method may be called from any thread.

    Args:
        generator: What draws.
        waiting: Most jobs that wait; one owner gets three quarters of the places at most, if it has a name.
        say: Takes what its users should not see: unexpected errors.
    """

    def __init__(self, generator: Draws, *, waiting: int, say: Callable[[str], None] = lambda _sentence: None) -> None:
        self._generator = generator
        self._capacity = waiting
        self._say = say
        self._changed = threading.Condition()
        self._queues: OrderedDict[str, deque[PictureJob]] = OrderedDict()
        self._running: PictureJob | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="haori-draw", daemon=True)
        self._thread.start()

    def submit(self, owner: str, rounds: Sequence[Round], steps: int) -> PictureJob:
        """Queue a job.

        Args:
            owner: Whose it is; owners take turns.
            rounds: The pictures of each round.
            steps: Of all rounds.

        Raises:
            OverloadedError: There is no room.
            UnavailableError: The queue is closed.
        """
        job = PictureJob(owner, tuple(rounds), steps)
        with self._changed:
            if self._closing:
                raise UnavailableError(_ENDED)
            waiting = sum(map(len, self._queues.values()))
            own = len(self._queues.get(owner, ()))
            if waiting >= self._capacity or (owner and own >= max(1, 3 * self._capacity // 4)):
                raise OverloadedError(
                    f"{own if waiting < self._capacity else waiting} drawings are waiting, which is as many as may "
                    "(--picture-queue); try again later.",
                    retry_after_s=_RETRY_S,
                )
            self._queues.setdefault(owner, deque()).append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: PictureJob) -> None:
        """End a job at once, at the latest after its current step; one that has ended is no error."""
        with self._changed:
            job._cancelled = True
            if job in (queue := self._queues.get(job.owner, deque())):
                queue.remove(job)
                if not queue:
                    del self._queues[job.owner]
                job.pictures.cancel()
                self._changed.notify_all()

    def interrupt(self, owner: str) -> None:
        """Let the job that runs end with the rounds that are done, if it is the owner's; an empty owner is anybody."""
        with self._changed:
            if self._running is not None and owner in ("", self._running.owner):
                self._running.interrupted = True

    def skip(self, owner: str) -> None:
        """Let the job that runs go on with its next round, likewise."""
        with self._changed:
            if self._running is not None and owner in ("", self._running.owner):
                self._running._skip = True

    def progress(self, owner: str) -> Progress:
        """Return how far the work of an owner is; an empty owner is anybody."""
        with self._changed:
            held = [queue for whose, queue in self._queues.items() if owner in ("", whose)]
            waiting = [job for queue in held for job in queue]
            job = self._running
        count = sum(len(one.rounds) for one in waiting)
        if job is None or owner not in ("", job.owner):
            return Progress(rounds=count, waiting=len(waiting))
        share = min(1.0, job.done / max(1, job.steps))
        spent = time.monotonic() - job.started_s
        left = spent / share * (1.0 - share) if share else 0.0
        return Progress(
            share, left, count + len(job.rounds), job.round, job.done, job.steps, len(waiting), job.interrupted
        )

    def status(self) -> tuple[int, int]:
        """Return how many jobs run and how many wait."""
        with self._changed:
            return int(self._running is not None), sum(map(len, self._queues.values()))

    def drain(self, timeout_s: float) -> bool:
        """Wait until every job has ended; False if some have not after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running is None and not self._queues, timeout_s)

    def close(self) -> None:
        """End every job with an error, and the thread."""
        with self._changed:
            self._closing = True
            waiting = [job for queue in self._queues.values() for job in queue]
            self._queues.clear()
            self._changed.notify_all()
        for job in waiting:
            if job.pictures.set_running_or_notify_cancel():
                job.pictures.set_exception(UnavailableError(_ENDED))
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._queues)
                if self._closing:
                    return
                self._running = job = self._take()
                taken = job.pictures.set_running_or_notify_cancel()
            if taken:
                self._draw(job)
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def _take(self) -> PictureJob:
        owner, queue = self._queues.popitem(last=False)
        job = queue.popleft()
        if queue:
            self._queues[owner] = queue  # behind the others
        return job

    def _draw(self, job: PictureJob) -> None:
        job.started_s = time.monotonic()
        drawn: list[DrawnPicture] = []
        before = 0
        try:
            for number, requests in enumerate(job.rounds):
                job.round = number
                try:
                    drawn += self._generator.draw(requests, partial(self._step, job, before))
                except _StoppedError:
                    job.skipped += job._skip
                if job.interrupted or job._cancelled or self._closing:
                    break
                job._skip = False
                before = job.done
        except HaoriError as error:
            job.pictures.set_exception(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the next job must be drawn
            self._say("".join(traceback.format_exception(error)))
            job.pictures.set_exception(HaoriError("The picture could not be drawn; the server's log says why."))
        else:
            if self._closing:
                job.pictures.set_exception(UnavailableError(_ENDED))
            else:
                job.pictures.set_result(drawn)

    def _step(self, job: PictureJob, before: int, steps: StepsDone) -> None:
        job.done = before + steps.done
        if self._closing or job.interrupted or job._cancelled or job._skip:
            raise _StoppedError
