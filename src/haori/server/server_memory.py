"""Returns memory to the system after answers that used much of it. Lives on the event loop."""

import asyncio

from haori.core.free_memory import release_free_memory

__all__ = ["ServerMemory"]

_MUCH = 4096  # tokens with log-probabilities
_PAUSE_S = 5.0  # least time between two returns, each of which blocks other allocations


class ServerMemory:
    """Counts what answers used, and returns memory now and then, on a thread of its own."""

    def __init__(self) -> None:
        self._tokens = 0
        self._timer: asyncio.TimerHandle | None = None

    def used(self, tokens: int) -> None:
        """Count an ended answer with log-probabilities of so many tokens."""
        self._tokens += tokens
        if self._tokens >= _MUCH and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._give_back)

    def _give_back(self) -> None:
        self._tokens = 0
        self._timer = None
        asyncio.get_running_loop().run_in_executor(None, release_free_memory)
