"""One replica: a process that has the base open, answers requests and says how it is.

Its engine works on a thread of its own; stream chunks are handed to the replica's event loop, which sends all that
have gathered in one message, since each message to the front costs about a millisecond.
"""

import asyncio
import os
from collections.abc import AsyncIterator

from ray import serve

from haori.core.errors import HaoriError, InputError, OverloadedError, UnavailableError
from haori.library.adapter_files import AdapterFiles
from haori.serve.ray.plan import ReplicaChunks, ReplicaFacts, ReplicaPlan
from haori.serve.request import StreamChunk, TextRequest
from haori.serve.status import WorkerStatus

__all__ = ["EngineReplica"]

_REMEMBERED_MIXES = 256


class EngineReplica:
    """Answers the requests that Ray Serve gives it.

    Args:
        plan: What to open.

    Raises:
        HaoriError: The base cannot be opened.
    """

    def __init__(self, plan: ReplicaPlan) -> None:
        from haori.core.settings import settings
        from haori.library import Library
        from haori.serve import AdapterDirectory, open_engine

        os.environ["HAORI_HOME"] = str(plan.home)
        if plan.workspace is not None:
            os.environ["HAORI_WORKSPACE"] = str(plan.workspace)
        settings.cache_clear()
        directory = AdapterDirectory(Library(), plan.base.reference(), base_names=[plan.base.name], roots=plan.roots)
        self._remarks: list[str] = []
        self._engine = open_engine(
            plan.base, directory.files, plan.limits, weights=plan.weights, cache_bytes=plan.cache_bytes,
            pinned=lambda: directory.contents(plan.pinned), say=self._remarks.append,
        )  # fmt: skip
        self._name = serve.get_replica_context().replica_tag
        self._open: set[asyncio.Queue[StreamChunk]] = set()

    async def describe(self) -> ReplicaFacts:
        """Return what the front must know of the model."""
        engine = self._engine
        return ReplicaFacts(engine.context_length, engine.vocabulary, engine.stop_tokens, tuple(self._remarks))

    async def status(self) -> WorkerStatus:
        """Return how busy it is."""
        return WorkerStatus(self._name, pid=os.getpid(), engine=self._engine.status())

    async def answer(self, request: TextRequest) -> AsyncIterator[ReplicaChunks]:
        """Answer one request; closing the iterator cancels it."""
        mix = serve.get_multiplexed_model_id()
        if mix:
            await self._remember(mix)
        inbox: asyncio.Queue[StreamChunk] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(chunk: StreamChunk) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, chunk)

        try:
            self._engine.submit(request, deliver)
        except InputError as error:
            yield ReplicaChunks(self._name, (StreamChunk(finish="error", error=str(error), fault="request"),))
            return
        except (OverloadedError, UnavailableError) as error:
            yield ReplicaChunks(self._name, (StreamChunk(finish="error", error=str(error), fault="outage"),))
            return
        self._open.add(inbox)
        ended = False
        try:
            while not ended:
                chunks = [await inbox.get()]
                while not inbox.empty():
                    chunks.append(inbox.get_nowait())
                ended = chunks[-1].finish is not None
                yield ReplicaChunks(self._name, tuple(chunks))
        finally:
            self._open.discard(inbox)
            if not ended:
                self._engine.cancel(request.id)

    async def check_adapter(self, files: AdapterFiles, adapter: str) -> HaoriError | None:
        """Return why no request could be answered with an adapter; None if all is well."""
        try:
            await asyncio.to_thread(self._engine.check_adapter, files, adapter)
        except HaoriError as error:
            return error
        return None

    async def check_health(self) -> None:
        """Have Ray Serve replace this replica when its engine cannot go on.

        Raises:
            RuntimeError: It cannot.
        """
        if (failure := self._engine.failure) is not None:
            message = f"A replica cannot go on: {failure}"
            for inbox in self._open:
                inbox.put_nowait(StreamChunk(finish="error", error=message, fault="outage"))
            raise RuntimeError(message)

    def __del__(self) -> None:
        """Free everything; Ray Serve calls this when it stops the replica."""
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.close()

    @serve.multiplexed(max_num_models_per_replica=_REMEMBERED_MIXES)  # type: ignore[untyped-decorator]
    async def _remember(self, mix: str) -> str:
        """Have Ray Serve know that these adapters were used here; the engine itself decides which stay in memory."""
        return mix
