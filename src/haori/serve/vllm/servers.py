"""The vLLM servers of one engine: which are reachable, and when one is back. Lives on the engine's loop.

One that was started here is started again when it ends, three times within ten minutes: what ends so often will not
come to stay.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from haori.core.errors import HaoriError
from haori.serve.vllm.process import VllmProcess
from haori.serve.vllm.routing import Server

__all__ = ["VllmServers"]

_POLL_EVERY_S = 0.5
_STARTS = 3
_WITHIN_S = 600.0


class VllmServers:
    """Servers of one base.

    Args:
        servers: All of them.
        say: Takes sentences for people.
    """

    def __init__(self, servers: Sequence[Server], say: Callable[[str], None]) -> None:
        self.servers = tuple(servers)
        self._say = say
        self._given_up: set[Server] = set()
        self._started_s: dict[Server, list[float]] = {}

    async def doubt(self, server: Server) -> None:
        """Check a server that did not answer; it gets no more requests if it is unhealthy."""
        if await server.upstream.healthy() or not server.alive:
            return
        server.alive = False
        self._say(f"The vLLM server at {server.upstream.url} is out of reach; it gets no requests until it is back.")

    async def watch(self, back: Callable[[], None]) -> None:
        """Poll unreachable servers until cancelled; `back` is called whenever one is reachable again."""
        while True:
            await asyncio.sleep(_POLL_EVERY_S)
            for server in self.servers:
                if server in self._given_up:
                    continue
                process = server.process
                if process is not None and not process.running:
                    server.alive = False
                    if not process.closed:
                        await self._start_again(server, process)
                elif not server.alive and await self._is_back(server):
                    # It may have been started anew, and then has no adapters.
                    server.adapters.forget_all()
                    server.alive = True
                    self._say(f"The vLLM server at {server.upstream.url} is back.")
                    back()

    async def _is_back(self, server: Server) -> bool:
        try:
            if not await server.upstream.healthy():
                return False
            model = await server.upstream.served()
        except HaoriError:
            return False
        if model != server.model:
            self._give_up(
                server,
                f"The vLLM server at {server.upstream.url} serves {model.root!r} now, another base than before "
                f"({server.model.root!r}); it gets no more requests.",
            )
            return False
        return True

    async def _start_again(self, server: Server, process: VllmProcess) -> None:
        now = time.monotonic()
        recent = [at for at in self._started_s.get(server, []) if now - at < _WITHIN_S]
        how = process.ended()
        if len(recent) >= _STARTS:
            self._give_up(server, f"{how} It was started again {len(recent)} times; start this server anew.")
            return
        self._started_s[server] = [*recent, now]
        try:
            await asyncio.to_thread(process.start_again)
        except (HaoriError, OSError) as error:
            self._give_up(server, f"{how} It could not be started again: {error}")
            return
        self._say(f"{how} It is started again, which may take minutes.")

    def _give_up(self, server: Server, sentence: str) -> None:
        self._given_up.add(server)
        self._say(sentence)
