"""One training run while it is in memory: its requests in their order, its answers, and what a restart needs.

Clients number the requests of a run from 1. One that comes before its turn waits; one that comes again is answered
with the same promise. Each is written to the run's journal before it is promised, and after some steps the weights,
the optimizer and the latest answers are saved: a run that is begun again from there and does what the journal holds
ends where it was however its process ended: bit for bit, but for what was computed in one product with other runs.
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import HaoriError, InputError, TrainingError, UnavailableError
from haori.core.storage import make_folder
from haori.jobs.sessions.gone import GoneError
from haori.jobs.sessions.packing import read_call, read_result, write_call, write_result
from haori.jobs.sessions.records import Call, ForwardCall, LoadCall, Promise, SaveCall, StepCall

if TYPE_CHECKING:
    from haori.jobs.tenants.pool import TrainingPool

__all__ = ["Run", "SavedState", "pass_on"]

_AHEAD = 4096  # requests that may wait for one that is missing
_KEPT_ANSWERS = 64
_MOST_ANSWERS = 1024
_SAVE_AFTER_REQUESTS = 64
_SAVE_AFTER_BYTES = 64 << 20
_SAVE_AFTER_S = 60.0

SavedState = Callable[[int, Path], None]
"""Called when a state is whole: the number of the last request in it, and its folder."""


class Run:
    """One run.

    Args:
        identity: Its id, which is its name in the pool too.
        owner: The account that it belongs to.
        folder: Where journal and states are.
        pool: What trains; it must have the run's adapter, as of request `applied`, or be asked for it before.
        finish: Runs what follows a computation, such as writing files, one after another.
        save: Does a `SaveCall`, and returns its answer.
        load: Does a `LoadCall`, and returns its answer.
        saved: Called when a state is whole.
        library: Name in the library that its checkpoints for sampling go to; None for none.
        applied: The last request whose effect is in the adapter.
    """

    def __init__(
        self,
        identity: str,
        owner: str,
        folder: Path,
        pool: "TrainingPool",
        finish: Executor,
        *,
        save: Callable[["Run", int, SaveCall], "Future[dict[str, Any]]"],
        load: Callable[["Run", LoadCall], "Future[dict[str, Any]]"],
        saved: SavedState,
        library: str | None = None,
        applied: int = 0,
    ) -> None:
        self.id = identity
        self.owner = owner
        self.folder = folder
        self.library = library
        self.last_request_s = time.monotonic()
        self._pool = pool
        self._finish = finish
        self._save, self._load, self._saved = save, load, saved
        self._lock = threading.RLock()
        self._next = applied + 1
        self._held: dict[int, Call] = {}
        self._promises: dict[int, Promise] = {}
        self._since = [0, 0, time.monotonic()]  # requests and bytes since the last state, and its time
        self._closed = False
        make_folder(self._journal)

    @property
    def _journal(self) -> Path:
        return self.folder / "journal"

    @property
    def busy(self) -> bool:
        """Say whether requests are under way."""
        with self._lock:
            return any(not promise.future.done() for promise in self._promises.values())

    def submit(self, number: int, call: Call) -> Promise:
        """Take a request, do it in its turn, and return its promise; that of the first time if it came before.

        Raises:
            InputError: Its number is none, or too far ahead.
            GoneError: It was done, and its answer is no longer kept.
            StorageError: It could not be written to the journal.
        """
        self.last_request_s = time.monotonic()
        with self._lock:
            known = self._known(number)
            if known is not None:
                return known
            path = self._journal / f"{number:09d}.npz"
            write_call(path, call)
            return self._take(number, call, path.stat().st_size)

    def promise(self, number: int) -> Promise:
        """Return the promise of a request.

        Raises:
            GoneError: There is none.
        """
        with self._lock:
            if number not in self._promises:
                raise GoneError(f"The answer to request {number} of {self.id!r} is not kept; send the request again.")
            return self._promises[number]

    def recover(self, state: Path | None) -> None:
        """Take the answers of a saved state, and do what the journal holds after it."""
        with self._lock:
            for path in sorted((state / "answers").glob("*.npz")) if state is not None else ():
                promise = self._new(int(path.stem))
                found = read_result(path)
                if isinstance(found, HaoriError):
                    promise.future.set_exception(found)
                else:
                    promise.future.set_result(found)
            for path in sorted(self._journal.glob("[0-9]*.npz")):
                number = int(path.stem)
                if number < self._next:
                    path.unlink(missing_ok=True)
                else:
                    self._take(number, read_call(path), path.stat().st_size)

    def close(self) -> None:
        """Take no more requests; what the journal holds is done when the run is begun again."""
        with self._lock:
            self._closed = True
            self._held.clear()

    def _known(self, number: int) -> Promise | None:
        if self._closed:
            raise GoneError(f"The training run {self.id!r} was put away; send the request again.")
        if number < 1:
            raise InputError(f"seq_id is {number}; the requests of a run are numbered from 1.")
        if number in self._promises:
            return self._promises[number]
        if number < self._next:
            raise InputError(
                f"Request {number} of {self.id!r} was done before and its answer is no longer kept; the next is "
                f"{self._next}."
            )
        if number >= self._next + _AHEAD:
            raise InputError(f"Request {number} of {self.id!r} is far ahead: request {self._next} has not come.")
        return None

    def _new(self, number: int) -> Promise:
        made = Promise(f"{self.id}:{number}", self.owner, run=self.id)
        self._promises[number] = made
        return made

    def _take(self, number: int, call: Call, size: int) -> Promise:
        promise = self._new(number)
        self._held[number] = call
        self._since[0] += 1
        self._since[1] += size
        while self._next in self._held:
            turn = self._next
            self._next += 1
            self._dispatch(turn, self._held.pop(turn))
        self._forget()
        return promise

    def _dispatch(self, number: int, call: Call) -> None:
        """Ask the pool for it; whatever it asks is done in the order in which it was asked."""
        promise = self._promises[number]
        try:
            if isinstance(call, ForwardCall):
                answer: Future[Any] = self._pool.forward_backward(
                    self.id, call.data, call.loss, call.config, forward_only=call.forward_only
                )
                pass_on(answer, promise.future)
            elif isinstance(call, StepCall):
                pass_on(self._pool.optim_step(self.id, call.params), promise.future, lambda found: {"metrics": found})
                self._save_state(number)
            elif isinstance(call, SaveCall):
                pass_on(self._save(self, number, call), promise.future)
            elif number > 1:
                raise InputError(
                    f"LoadWeights is not permitted with seq_id {number}: weights are loaded by the first request of a "
                    "run; create a training client from the state instead."
                )
            else:
                pass_on(self._load(self, call), promise.future)
        except HaoriError as error:
            promise.future.set_exception(error)

    def _save_state(self, number: int) -> None:
        """After a step, when enough was done since the last time, save everything as of this request."""
        requests, size, since = self._since
        if requests < _SAVE_AFTER_REQUESTS and size < _SAVE_AFTER_BYTES and time.monotonic() - since < _SAVE_AFTER_S:
            return
        self._since = [0, 0, time.monotonic()]
        before = {turn: one for turn, one in self._promises.items() if turn <= number}
        folder = self.folder / f"state-{number:09d}"
        shutil.rmtree(folder, ignore_errors=True)  # of a process that ended before it was whole
        make_folder(folder)
        weights = self._pool.save(self.id, folder / "weights", optimizer=True)

        def write() -> None:
            with suppress(HaoriError):  # an earlier state and a longer journal do as well
                weights.result()
                self._write_state(number, folder, before)

        # An answer may take longer than those after it: a proof for the library does.
        before_it = [one.future for one in before.values() if not one.future.done()]
        _when_done([weights, *before_it], lambda: self._finish.submit(write))

    def _write_state(self, number: int, folder: Path, promises: dict[int, Promise]) -> None:
        """Write the answers beside the weights; the state counts once `saved` was told of it."""
        for turn in sorted(promises)[-_KEPT_ANSWERS:]:
            future = promises[turn].future
            result = future.exception() or future.result()
            write_result(folder / "answers" / f"{turn:09d}.npz", _in_words(result))
        self._saved(number, folder)
        for path in self._journal.glob("[0-9]*.npz"):
            if int(path.stem) <= number:
                path.unlink(missing_ok=True)
        for other in self.folder.glob("state-*"):
            if int(other.name.removeprefix("state-")) < number:
                shutil.rmtree(other, ignore_errors=True)

    def _forget(self) -> None:
        """Drop old answers: those that were retrieved, and beyond a bound all."""
        for turn in sorted(self._promises)[:-_KEPT_ANSWERS]:
            promise = self._promises[turn]
            if promise.retrieved_s is not None or (promise.future.done() and len(self._promises) > _MOST_ANSWERS):
                del self._promises[turn]


def pass_on(source: "Future[Any]", target: "Future[Any]", change: Callable[[Any], Any] = lambda found: found) -> None:
    """Give a promise what a computation gives."""

    def take(done: "Future[Any]") -> None:
        if done.cancelled():  # the server ends; a restart does it from the journal
            return
        error = done.exception()
        if error is None:
            target.set_result(change(done.result()))
        elif not isinstance(error, UnavailableError):  # the pool ends; a restart does it from the journal
            target.set_exception(_in_words(error))

    source.add_done_callback(take)


def _when_done(futures: "Sequence[Future[Any]]", then: Callable[[], Any]) -> None:
    """Do something once all of them are done, on the thread of the last."""
    left, lock = [len(futures)], threading.Lock()

    def one_less(_: "Future[Any]") -> None:
        with lock:
            left[0] -= 1
            is_last = left[0] == 0
        if is_last:
            then()

    for future in futures:
        future.add_done_callback(one_less)


def _in_words(result: Any) -> Any:
    if isinstance(result, BaseException) and not isinstance(result, HaoriError):
        return TrainingError(f"The request failed ({type(result).__name__}: {str(result)[:300]}).")
    return result
