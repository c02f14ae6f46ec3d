"""Gives memory back to the system after answers that took much of it. Lives on the event loop."""

import asyncio

from haori.core.free_memory import release_free_memory

__all__ = ["ServerMemory"]

_MUCH = 4096  # tokens with log-probabilities
_PAUSE_S = 5.0  # at least so long between two times: it holds up whoever wants memory meanwhile


class ServerMemory:
    """Counts what answers used, and gives back seldom, on a thread of its own."""

    def __init__(self) -> None:
        self._tokens = 0
        self._timer: asyncio.TimerHandle | None = None

    def used(self, tokens: int) -> None:
        """Say that an answer with log-probabilities of so many tokens has ended."""
        self._tokens += tokens
        if self._tokens >= _MUCH and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._give_back)

    def _give_back(self) -> None:
        self._tokens = 0
        self._timer = None
        asyncio.get_running_loop().run_in_executor(None, release_free_memory)
