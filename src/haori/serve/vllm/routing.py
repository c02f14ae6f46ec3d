"""Which of several vLLM servers gets a request.

Requests of one adapter go to the same server, so that few servers load it and its prefixes are cached in one place:
rendezvous hashing (Thaler and Ravishankar, 1998) moves only the adapters of a server that goes or comes. While that
one is full the next in its order steps in. The base is everywhere, so its requests go where the least is going on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from haori.core.errors import UnavailableError
from haori.serve.vllm.process import VllmProcess
from haori.serve.vllm.registry import LoadedAdapters
from haori.serve.vllm.upstream import ServedModel, Upstream

__all__ = ["Server", "choose_server"]


@dataclass(eq=False)
class Server:
    """A vLLM server with what goes on there.

    Attributes:
        upstream: How it is talked to.
        model: What it serves.
        adapters: What it has loaded.
        process: What runs it, if it was started here.
        running: Ids of the requests that it works on.
        alive: Whether it could be reached the last time.
    """

    upstream: Upstream
    model: ServedModel
    adapters: LoadedAdapters
    process: VllmProcess | None = None
    running: set[str] = field(default_factory=set)
    alive: bool = True


def choose_server(servers: Sequence[Server], adapter: str | None, room: int) -> Server | None:
    """Return the server for a request; None if all are full.

    Args:
        servers: All of them.
        adapter: What vLLM calls the adapter; None for the base.
        room: Requests that one server works on at once.

    Raises:
        UnavailableError: None can be reached.
    """
    alive = [server for server in servers if server.alive]
    if not alive:
        urls = ", ".join(server.upstream.url for server in servers)
        raise UnavailableError(f"No vLLM server can be reached ({urls}); ask again later.")
    free = [server for server in alive if len(server.running) < room]
    if adapter is None:
        return min(free, key=lambda server: len(server.running), default=None)
    return max(free, key=lambda server: _weight(server.upstream.url, adapter), default=None)


def _weight(url: str, adapter: str) -> bytes:
    return hashlib.sha256(f"{url}\n{adapter}".encode()).digest()
