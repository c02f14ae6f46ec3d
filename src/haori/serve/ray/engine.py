"""The front of the replicas: takes requests as the text engine does, and has Ray Serve find a replica for each.

One thread joins Ray, and then runs an event loop with a task for each request. Requests with the same adapters go to
a replica that has used them. When a replica dies, requests of which nothing was delivered go to another one, once; the
others end with an error. It knows nothing about HTTP.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from haori.core.errors import HaoriError, InputError, OverloadedError, UnavailableError
from haori.serve.engine.queue_share import check_share
from haori.serve.prompt_check import check_prompt
from haori.serve.ray.plan import ReplicaChunks, ReplicaFacts, ReplicaPlan
from haori.serve.ray.scale import Scale
from haori.serve.ray.watch import ReplicaWatch
from haori.serve.request import Deliver, Sampling, StreamChunk, TextRequest
from haori.serve.status import EngineStatus, adapters_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from haori.library import AdapterFiles

__all__ = ["RayEngine"]

Deployed = AbstractContextManager[tuple[Any, ReplicaFacts]]

_DIED = "The replica that wrote this answer ended before it was complete; ask again."
_DIED_TWICE = "Two replicas ended before they began this answer; ask again."
_CHECK_S = 60.0
_GONE = "No replica has answered for a minute; ask again later."


@dataclass
class _Call:
    """A request under way.

    Attributes:
        request: What is asked for.
        deliver: Takes the stream chunks.
        begun: Whether a chunk of the answer was delivered.
        given_up: Whether it is cancelled for want of a replica.
        task: Carries the answer.
    """

    request: TextRequest
    deliver: Deliver
    begun: bool = False
    given_up: bool = False
    task: "asyncio.Task[StreamChunk] | None" = None


class RayEngine:
    """Answers requests on replicas; made by `open_ray_engine`.

    Args:
        plan: What the replicas have open.
        tokenizer: The base's tokenizer.
        scale: How many replicas there are.
        deployed: Joins Ray, and deploys for as long as its context lasts.
        say: Takes sentences for people.

    Raises:
        HaoriError: Ray or a replica could not begin.
    """

    def __init__(
        self, plan: ReplicaPlan, tokenizer: "PreTrainedTokenizerBase", scale: Scale,
        deployed: Callable[[], Deployed], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.base = plan.base
        self.tokenizer = tokenizer
        self._limits = plan.limits
        self._scale = scale
        self._watch = ReplicaWatch(say)
        self._lock = threading.Condition()
        self._calls: dict[str, _Call] = {}
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._constraints: Any = None
        began: Future[ReplicaFacts] = Future()
        self._thread = threading.Thread(target=self._work, args=(deployed, began), name="haori-ray", daemon=True)
        self._thread.start()
        self._facts = began.result()
        for remark in self._facts.remarks:
            say(remark)

    @property
    def context_length(self) -> int:
        """Return the longest prompt and answer together, in tokens."""
        return self._facts.context_length

    @property
    def failure(self) -> str | None:
        """Say why no request can be answered now; None while requests can be answered."""
        if not self._thread.is_alive():
            return "The connection to Ray has ended; start the server again."
        return _GONE if self._watch.gone else None

    def check_adapter(self, files: "AdapterFiles", adapter: str) -> None:
        """Refuse an adapter that no request could be answered with; a replica reads it.

        Raises:
            HaoriError: It is one.
            UnavailableError: No replica answers.
        """
        refusal: HaoriError | None
        try:
            refusal = asyncio.run_coroutine_threadsafe(self._ask_to_check(files, adapter), self._loop).result(_CHECK_S)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises, no replica has answered
            raise UnavailableError(f"No replica could check the adapter: {_reason(error)}") from None
        if refusal is not None:
            raise refusal

    def submit(self, request: TextRequest, deliver: Deliver) -> None:
        """Queue a request. `deliver` is called on the thread of this engine, the last time with `finish` set.

        Raises:
            InputError: The prompt or the schema cannot be used, or the request's id is in use.
            OverloadedError: Too many requests wait.
            UnavailableError: No replica has answered for a while.
        """
        check_prompt(request.prompt, self.context_length, self._facts.vocabulary, request.prompt_targets.values())
        if request.sampling.json_schema is not None or request.sampling.grammar is not None:
            self._check_constraint(request.sampling)
        call = _Call(request, deliver)
        with self._lock:
            if self._closing:
                raise OverloadedError("The engine is shutting down.", retry_after_s=5.0)
            if self._watch.gone:
                raise UnavailableError(_GONE)
            room = self._limits.running * max(len(self._watch.latest), self._scale.fewest)
            waiting = len(self._calls) - room
            own = min(waiting, sum(call.request.owner == request.owner for call in self._calls.values()))
            again = max(1.0, round(waiting / room))
            check_share(request.owner, own, waiting, self._limits.waiting, retry_after_s=again, why="--max-queue")
            if request.id in self._calls:
                raise InputError(f"A request {request.id!r} is under way already; choose another id.")
            self._calls[request.id] = call
            self._loop.call_soon_threadsafe(self._begin, call)  # under the lock, so that it comes before an end

    def cancel(self, request_id: str) -> None:
        """End a request; one that has ended is no error."""
        with suppress(RuntimeError):  # closed: everything has ended
            self._loop.call_soon_threadsafe(self._cancel, request_id)

    def pause(self, request_id: str) -> None:
        """Do nothing: a replica is not told to pause."""

    def resume(self, request_id: str) -> None:
        """Do nothing, as for `pause`."""

    def status(self) -> EngineStatus:
        """Return how busy all replicas together are; figures of their engines are of the last second."""
        with self._lock:
            calls = list(self._calls.values())
        begun = [call for call in calls if call.begun]
        replicas = tuple(self._watch.latest.values())
        engines = [replica.engine for replica in replicas if replica.engine is not None]
        totals = self._watch.totals()
        return EngineStatus(
            running=len(begun),
            waiting=len(calls) - len(begun),
            running_adapters=adapters_of(call.request.adapters for call in begun),
            waiting_adapters=adapters_of(call.request.adapters for call in calls if not call.begun),
            kv_used_bytes=sum(engine.kv_used_bytes for engine in engines),
            kv_total_bytes=sum(engine.kv_total_bytes for engine in engines),
            prefix_queries=totals.prefix_queries,
            prefix_hits=totals.prefix_hits,
            adapter_loads=totals.adapter_loads,
            workers=replicas,
        )

    def drain(self, timeout_s: float) -> bool:
        """Wait until every request has ended; False if some have not after `timeout_s`."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._calls, timeout_s)

    def close(self) -> None:
        """Cancel what runs, end the replicas, and Ray too if it was started here."""
        with self._lock:
            closing, self._closing = self._closing, True
        if not closing:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._constraints is not None:
            self._constraints.close()

    async def _ask_to_check(self, files: "AdapterFiles", adapter: str) -> HaoriError | None:
        refusal: HaoriError | None = await self._handle.options(stream=False, method_name="check_adapter").remote(
            files, adapter
        )
        return refusal

    def _check_constraint(self, sampling: Sampling) -> None:
        """Refuse an unusable schema or grammar before the request is accepted."""
        from haori.serve.sampling.constraints import Constraints

        if self._constraints is None:
            facts = self._facts
            self._constraints = Constraints(self.tokenizer, facts.vocabulary, facts.stop_tokens)
        self._constraints.of(sampling)

    def _work(self, deployed: Callable[[], Deployed], began: "Future[ReplicaFacts]") -> None:
        try:
            with deployed() as (handle, facts):
                self._loop.run_until_complete(self._watch.poll(handle))
                self._handle = handle.options(stream=True, method_name="answer")
                began.set_result(facts)
                self._loop.run_until_complete(self._serve(handle))
        except Exception as error:  # noqa: BLE001 - whatever it was, whoever waits for the start must be told
            if not began.done():
                began.set_exception(error if isinstance(error, HaoriError) else HaoriError(f"Ray failed: {error}"))
        finally:
            self._loop.close()

    async def _serve(self, handle: Any) -> None:
        watching = asyncio.create_task(self._watch.keep_polling(handle, self._give_up))
        await self._stop.wait()
        tasks = [watching, *(call.task for call in self._calls.values() if call.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, call: _Call) -> None:
        call.task = asyncio.create_task(self._answer(call))
        call.task.add_done_callback(lambda task: self._end(call, task))

    def _end(self, call: _Call, task: "asyncio.Task[StreamChunk]") -> None:
        """Deliver the last chunk of an answer, also of one that was cancelled before its task had begun."""
        with self._lock:
            del self._calls[call.request.id]
            self._lock.notify_all()
        if not task.cancelled():
            call.deliver(task.result())
        else:
            call.deliver(_outage(_GONE) if call.given_up else StreamChunk(finish="cancelled"))

    def _cancel(self, request_id: str) -> None:
        call = self._calls.get(request_id)
        if call is not None and call.task is not None:
            call.task.cancel()

    def _give_up(self) -> None:
        """End the answers that no replica has begun: none has been there for a while."""
        for call in self._calls.values():
            if not call.begun and call.task is not None:
                call.given_up = True
                call.task.cancel()

    async def _answer(self, call: _Call) -> StreamChunk:
        """Deliver an answer from a replica, or from another if the first died before it sent anything."""
        try:
            last = await self._carry(call, call.request)
            if last is None and not call.begun:
                last = await self._carry(call, replace(call.request, id=f"{call.request.id}-again"))
        except Exception as error:  # noqa: BLE001 - whatever it was, the caller must hear of it
            return StreamChunk(finish="error", error=f"No replica could answer: {_reason(error)}")
        return last or _outage(_DIED if call.begun else _DIED_TWICE)

    async def _carry(self, call: _Call, request: TextRequest) -> StreamChunk | None:
        """Deliver the chunks of an answer; return the last one, or None if the replica died."""
        from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
        from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

        key = "+".join(adapter for adapter, _ in request.adapters)
        response = self._handle.options(multiplexed_model_id=key).remote(request)
        try:
            async for message in response:
                if (last := self._deliver(call, message)) is not None:
                    return last
        except (
            RayActorError, WorkerCrashedError, NodeDiedError, DeploymentUnavailableError, ReplicaUnavailableError,
        ):  # fmt: skip
            return None
        except asyncio.CancelledError:
            response.cancel()
            raise
        return None

    def _deliver(self, call: _Call, message: ReplicaChunks) -> StreamChunk | None:
        """Deliver all chunks but the last of an answer, which is returned."""
        for chunk in message.chunks:
            if chunk.finish is not None:
                return chunk
            call.begun = True
            call.deliver(chunk)
        return None


def _outage(sentence: str) -> StreamChunk:
    return StreamChunk(finish="error", error=sentence, fault="outage")


def _reason(error: Exception) -> str:
    """Return the last line: an error from a replica comes with its traceback."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]
