"""The text engine in front of one or several vLLM servers.

Requests wait here, in fair turn, until a server has room: so limits, turns and cancellation are this project's. A
thread runs an event loop on which one task follows each answer. An adapter is loaded on the server that its requests
go to; if a server was started anew, it is told again. A server that is out of reach gets nothing until it is back;
requests that it had not begun to answer go to another.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import HaoriError, InputError, OverloadedError, UnavailableError
from haori.serve.engine.fair_queue import FairQueue, QueueKey
from haori.serve.engine.queue_share import check_share
from haori.serve.engine.scheduler import EngineLimits
from haori.serve.engine.unforeseen import unforeseen
from haori.serve.prompt_check import check_prompt
from haori.serve.request import Deliver, Fault, Finish, TextRequest
from haori.serve.status import EngineStatus, WorkerStatus, adapters_of
from haori.serve.vllm.answer import VllmAnswer
from haori.serve.vllm.conversion import VllmCopies, vllm_name
from haori.serve.vllm.loop import LoopThread
from haori.serve.vllm.routing import Server, choose_server
from haori.serve.vllm.servers import VllmServers
from haori.serve.vllm.upstream import ModelGoneError
from haori.serve.vllm.wire import completion_body

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from haori.bases import Base
    from haori.library import AdapterFiles

__all__ = ["VllmEngine"]

_TRIES = 3
_READERS = 2
_CLOSE_S = 10.0


@dataclass(eq=False)
class _Job:
    """A request under way: it waits while it has no task."""

    request: TextRequest
    answer: VllmAnswer
    name: str | None  # vLLM's, of the adapter or blend
    server: Server | None = None
    task: "asyncio.Task[None] | None" = None
    tries: int = 0
    again: bool = False


class VllmEngine:
    """Answers requests through vLLM servers.

    Args:
        base: What they serve.
        tokenizer: Its tokenizer.
        servers: The servers.
        loop: Where they are talked to; closed with the engine.
        copies: Adapters in a form that vLLM takes.
        stop_tokens: Ids that end an answer.
        limits: What it takes on; `running` is for each server.
        vocabulary: Number of token ids.
        ending: Called last when the engine is closed.
    """

    def __init__(
        self,
        base: "Base",
        tokenizer: "PreTrainedTokenizerBase",
        servers: VllmServers,
        loop: LoopThread,
        copies: VllmCopies,
        *,
        stop_tokens: frozenset[int],
        limits: EngineLimits,
        vocabulary: int,
        ending: Callable[[], None] = lambda: None,
    ) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.limits = limits
        self.context_length = limits.context_length
        self._servers = servers
        self._loop = loop
        self._copies = copies
        self._stop_tokens = stop_tokens
        self._vocabulary = vocabulary
        self._ending = ending
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="haori-vllm-copy")
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}  # changed under the lock only
        self._closing = False
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._queue: FairQueue[_Job] = FairQueue()  # this and what follows: on the loop's thread only
        loop.call(self._begin_watching)

    @property
    def failure(self) -> str | None:
        """Say why no request can be answered now; None while requests can be answered."""
        try:
            choose_server(self._servers.servers, None, self.limits.running)
        except UnavailableError as error:
            return str(error)
        return None

    def check_adapter(self, files: "AdapterFiles", adapter: str) -> None:
        """Refuse an adapter that vLLM cannot serve.

        Raises:
            HaoriError: It is one.
        """
        self._copies.check(files, adapter)

    def submit(self, request: TextRequest, deliver: Deliver) -> None:
        """Queue a request. `deliver` is called on the loop's thread, the last time with `finish` set.

        Raises:
            InputError: The prompt is empty or too long, a token id is none of the model's, or the request's id is in
                use.
            OverloadedError: Too many requests wait.
        """
        self._check(request)
        answer = VllmAnswer(request, deliver, self.tokenizer, self._stop_tokens)
        job = _Job(request, answer, vllm_name(request.adapters) if request.adapters else None)
        with self._changed:
            if self._closing:
                raise OverloadedError("The engine is shutting down.", retry_after_s=5.0)
            if request.id in self._jobs:
                raise InputError(f"A request {request.id!r} is under way already; choose another id.")
            waiting = sum(other.task is None for other in self._jobs.values())
            own = sum(j.request.owner == request.owner and j.task is None for j in self._jobs.values())
            again = max(1.0, round(waiting / max(self.limits.running, 1)))
            check_share(request.owner, own, waiting, self.limits.waiting, retry_after_s=again, why="--max-queue")
            self._jobs[request.id] = job
        self._loop.call(self._add, job)

    def cancel(self, request_id: str) -> None:
        """End a request at once, in vLLM too; one that has ended is no error."""
        self._loop.call(self._cancel, request_id)

    def pause(self, request_id: str) -> None:
        """Do nothing: a vLLM server cannot pause a request."""

    def resume(self, request_id: str) -> None:
        """Do nothing, as for `pause`."""

    def status(self) -> EngineStatus:
        """Return how busy the engine is. What vLLM does with its memory is in its own `/metrics`."""
        with self._changed:
            jobs = list(self._jobs.values())
        running = [job for job in jobs if job.task is not None]
        waiting = [job for job in jobs if job.task is None]
        servers = self._servers.servers
        return EngineStatus(
            running=len(running),
            waiting=len(waiting),
            running_adapters=adapters_of(job.request.adapters for job in running),
            waiting_adapters=adapters_of(job.request.adapters for job in waiting),
            prefix_queries=self._prompt_tokens,
            prefix_hits=self._cached_tokens,
            adapter_loads=sum(server.adapters.loads for server in servers),
            adapter_evictions=sum(server.adapters.evictions for server in servers),
            workers=tuple(WorkerStatus(server.upstream.url, server.alive) for server in servers),
        )

    def drain(self, timeout_s: float) -> bool:
        """Wait until every request has ended; False if some have not after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout_s)

    def close(self) -> None:
        """Cancel what runs, and end the servers that were started here."""
        with self._changed:
            self._closing = True
            jobs = list(self._jobs)
        for request_id in jobs:
            self.cancel(request_id)
        self.drain(_CLOSE_S)
        self._ending()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._copies.close()

    def _check(self, request: TextRequest) -> None:
        if request.sampling.prompt_logprobs is not None or request.sampling.max_tokens == 0:
            raise InputError(
                "vLLM is not asked for log-probabilities of prompts, nor for answers of no token; leave out "
                "'prompt_logprobs', and 'echo' with 'logprobs', and ask for a token at least; or serve with --engine "
                "native."
            )
        check_prompt(request.prompt, self.limits.context_length, self._vocabulary)

    def _begin_watching(self) -> None:
        for server in self._servers.servers:
            server.adapters.gone = self._gone
        self._watching = asyncio.get_running_loop().create_task(self._servers.watch(self._pump))

    def _gone(self, name: str) -> None:
        if not any(server.adapters.holds(name) for server in self._servers.servers):
            self._readers.submit(self._copies.discard, name)

    def _add(self, job: _Job) -> None:
        self._queue.add(job.request.turn, job)
        self._pump()

    def _pump(self) -> None:
        """Start waiting requests in fair turn while servers have room."""
        full: set[QueueKey] = set()
        while len(self._queue):
            queue = next((name for name in self._queue.in_turn() if name not in full), None)
            if queue is None:
                return
            job = self._queue.peek(queue)
            try:
                server = choose_server(self._servers.servers, job.name, self.limits.running)
            except UnavailableError as error:
                self._queue.remove(queue, job)
                self._end(job, "error", str(error), "outage")
                continue
            if server is None:
                full.add(queue)
                continue
            self._queue.take(queue)
            server.running.add(job.request.id)
            job.server = server
            job.task = asyncio.get_running_loop().create_task(self._follow(job, server))
            # Not a `finally` in the task: one that is cancelled before its first step never begins.
            job.task.add_done_callback(partial(self._done, job))

    def _cancel(self, request_id: str) -> None:
        job = self._jobs.get(request_id)
        if job is None:
            return
        if job.task is not None:
            job.again = False
            job.task.cancel()
            return
        self._queue.remove(job.request.turn, job)
        self._end(job, "cancelled")

    async def _follow(self, job: _Job, server: Server) -> None:
        """Let a server answer a request, and tell its caller if that fails."""
        answer = job.answer
        try:
            await self._answer(job, server)
        except UnavailableError as error:
            await self._servers.doubt(server)
            job.tries += 1
            if answer.begun or job.tries >= _TRIES:
                answer.fail("error", str(error), "outage")
            else:
                job.again = True
        except InputError as error:
            answer.fail("error", str(error), "request")
        except HaoriError as error:
            await self._servers.doubt(server)
            answer.fail("error", str(error))
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it was, the caller must be told
            answer.fail("error", unforeseen(error))

    async def _answer(self, job: _Job, server: Server) -> None:
        if job.name is None:
            await self._stream(job, server, server.model.name)
            return
        mix = job.request.adapters

        async def find() -> Path:
            return await asyncio.get_running_loop().run_in_executor(self._readers, self._copies.folder, mix)

        if not self._copies.touch(mix):
            server.adapters.forget(job.name)  # its folder in the cache was deleted
        for last in (False, True):
            async with server.adapters.use(job.name, find):
                try:
                    await self._stream(job, server, job.name)
                except ModelGoneError:
                    server.adapters.forget(job.name)
                    if last or job.answer.begun:
                        raise
                else:
                    return

    async def _stream(self, job: _Job, server: Server, model: str) -> None:
        room = self.limits.context_length - len(job.request.prompt)
        body = completion_body(job.request, model, room=room, stop_tokens=self._stop_tokens)
        async with server.upstream.completion(body) as chunks:
            self._queue.serve(job.request.turn, len(job.request.prompt))
            async for chunk in chunks:
                job.answer.take(chunk)
                self._queue.serve(job.request.turn, len(chunk.tokens))
                if job.answer.stopped:
                    break
            job.answer.end()
        self._prompt_tokens += len(job.request.prompt)
        self._cached_tokens += job.answer.cached_tokens

    def _done(self, job: _Job, task: "asyncio.Task[None]") -> None:
        """Make room for others; called on the loop's thread when a task has ended in any way."""
        assert job.server is not None
        job.server.running.discard(job.request.id)
        self._queue.leave(job.request.turn)
        again, job.again, job.task, job.server = job.again, False, None, None
        if again and not self._closing:
            self._queue.add(job.request.turn, job, first=True)
        else:
            self._end(job, "cancelled")  # without effect if the caller was told already
        self._pump()

    def _end(self, job: _Job, finish: Finish, error: str | None = None, fault: Fault = "engine") -> None:
        with suppress(BaseException):  # a caller that raises must not hurt others
            job.answer.fail(finish, error, fault)
        with self._changed:
            self._jobs.pop(job.request.id, None)
            if not self._jobs:
                self._changed.notify_all()
