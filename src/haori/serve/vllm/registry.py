"""Which adapters one vLLM server has loaded, and under which names; the least recently used are unloaded first.

vLLM forgets all of them when it is started anew, so what is written here may be untrue: `forget` takes it back.
Lives on the engine's loop.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from haori.core.errors import HaoriError
from haori.serve.vllm.upstream import Upstream

__all__ = ["LoadedAdapters"]


class LoadedAdapters:
    """The adapters of one server.

    Args:
        upstream: The server.
        room: Adapters that it is to hold. Those in use are never unloaded, so there may be more for a while.

    Attributes:
        gone: Called with the name of each adapter that was unloaded.
    """

    def __init__(self, upstream: Upstream, room: int) -> None:
        self.room = room
        self.loads = 0
        self.evictions = 0
        self.gone: Callable[[str], object] = lambda _: None
        self._upstream = upstream
        self._loaded: dict[str, None] = {}  # the least recently used first
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._users: Counter[str] = Counter()

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded ones, the least recently used first."""
        return tuple(self._loaded)

    @asynccontextmanager
    async def use(self, name: str, find: Callable[[], Awaitable[Path]]) -> AsyncIterator[None]:
        """Keep an adapter loaded while the context lasts.

        Args:
            name: What the server is to call it.
            find: Finds its folder; called only if it is to be loaded.

        Raises:
            HaoriError: The server does not take it, or is out of reach.
        """
        self._users[name] += 1
        try:
            await self._arrive(name, find)
            yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]

    def holds(self, name: str) -> bool:
        """Say whether an adapter is loaded, or about to be."""
        return name in self._loaded or name in self._coming or self._users[name] > 0

    def forget(self, name: str) -> None:
        """Note that an adapter is not loaded any more."""
        self._loaded.pop(name, None)

    def forget_all(self) -> None:
        """Note that no adapter is loaded any more: the server was started anew."""
        self._loaded.clear()

    async def _arrive(self, name: str, find: Callable[[], Awaitable[Path]]) -> None:
        if name in self._loaded:
            self._loaded[name] = self._loaded.pop(name)
            return
        coming = self._coming.get(name)
        if coming is None:
            coming = self._coming[name] = asyncio.create_task(self._load(name, find))
            coming.add_done_callback(lambda _: self._coming.pop(name, None))
        # Others wait for the same load, so one who leaves does not end it.
        await asyncio.shield(coming)

    async def _load(self, name: str, find: Callable[[], Awaitable[Path]]) -> None:
        folder = await find()
        await self._make_room()
        await self._upstream.load(name, folder)
        self.loads += 1
        self._loaded[name] = None

    async def _make_room(self) -> None:
        idle = [name for name in self._loaded if not self._users[name]]
        excess = len(self._loaded) + len(self._coming) - self.room
        for name in idle[: max(excess, 0)]:
            self.forget(name)
            self.evictions += 1
            with suppress(HaoriError):  # a name too many does no harm; if the server is away, loading will say so
                await self._upstream.unload(name)
                self.gone(name)
