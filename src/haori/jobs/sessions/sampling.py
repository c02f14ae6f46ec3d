"""Samples for training clients, by the very engine that serves: token ids in, token ids and log-probabilities out."""

import threading
import time
import uuid
from concurrent.futures import Future
from typing import Protocol

from haori.core.errors import HaoriError, InputError, TrainingError, UnavailableError
from haori.jobs.sessions.records import SampleCall, Sampled
from haori.serve.request import AdapterMix, Deliver, StreamChunk, TextRequest

__all__ = ["Samples", "SamplingEngine"]

_CANCELLED = "The samples were cancelled."


class SamplingEngine(Protocol):
    """What writes the samples."""

    def submit(self, request: TextRequest, deliver: Deliver) -> None:
        """Queue a request; `deliver` is called on another thread, the last time with `finish` set."""

    def cancel(self, request_id: str) -> None:
        """End a request at once."""


class Samples:
    """The samples of one call while they are written.

    Attributes:
        future: Gives them all, or fails with the first error.
        made_s: When they were asked for, on the monotonic clock.
    """

    def __init__(self, engine: SamplingEngine, call: SampleCall) -> None:
        self.future: Future[list[Sampled]] = Future()
        self.made_s = time.monotonic()
        self._engine = engine
        self._call = call
        self._lock = threading.Lock()
        self._found = [Sampled() for _ in range(call.samples)]
        self._ids = [f"sample-{uuid.uuid4().hex}" for _ in range(call.samples)]
        self._left = set(range(call.samples))

    def begin(self, mix: AdapterMix, queue: str, owner: str) -> None:
        """Submit every sample.

        Args:
            mix: The adapters that act.
            queue: The name under which they wait for one another.
            owner: Whose turn they take.

        Raises:
            InputError: The prompt cannot be answered.
            OverloadedError: There is no room in the queue; none of the samples is written.
        """
        try:
            for number, identity in enumerate(self._ids):
                sampling = self._call.sampling
                changes: dict[str, object] = {}
                if number and sampling.seed is not None:
                    changes["seed"] = (sampling.seed + number + 2**63) % 2**64 - 2**63
                if number:
                    changes["prompt_logprobs"] = None  # they are those of the first
                request = TextRequest(
                    identity, self._call.prompt, mix, sampling.model_copy(update=changes), queue, owner,
                    {} if number else self._call.targets,
                )  # fmt: skip
                self._engine.submit(request, lambda chunk, number=number: self._take(number, chunk))  # type: ignore[misc]
        except BaseException:
            self._end_all(None)
            raise

    def cancel(self) -> None:
        """End what is still written."""
        self._end_all(UnavailableError(_CANCELLED))

    def _take(self, number: int, chunk: StreamChunk) -> None:
        """Take a part of a sample; runs on the engine's thread."""
        with self._lock:
            if number not in self._left:
                return
            one = self._found[number]
            stop = next((at for at, token in enumerate(chunk.tokens) if token in self._call.stop_ids), None)
            upto = len(chunk.tokens) if stop is None else stop + 1
            one.tokens += chunk.tokens[:upto]
            one.logprobs += chunk.logprobs[:upto]
            one.prompt_logprobs = chunk.prompt_logprobs or one.prompt_logprobs
            one.cached_tokens = chunk.cached_tokens or one.cached_tokens
            ended = stop is not None or chunk.finish is not None
            if not ended:
                return
            one.stopped = stop is not None or chunk.finish == "stop"
            self._left.discard(number)
            last = not self._left
        if stop is not None and chunk.finish is None:
            self._engine.cancel(self._ids[number])
        if stop is None and chunk.finish in ("error", "cancelled"):
            self._end_all(_error(chunk))
        elif last and not self.future.done():
            self.future.set_result(self._found)

    def _end_all(self, error: HaoriError | None) -> None:
        with self._lock:
            left, self._left = self._left, set()
        for number in left:
            self._engine.cancel(self._ids[number])
        if error is not None and not self.future.done():
            self.future.set_exception(error)


def _error(chunk: StreamChunk) -> HaoriError:
    if chunk.finish == "cancelled":
        return UnavailableError(_CANCELLED)
    sentence = chunk.error or "The engine failed."
    kinds = {"request": InputError, "outage": UnavailableError}
    return kinds.get(chunk.fault, TrainingError)(sentence)
