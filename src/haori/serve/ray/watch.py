"""Polls the replicas every second: which there are, and how busy."""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from haori.serve.status import EngineStatus, WorkerStatus

__all__ = ["ReplicaWatch", "Totals"]

_PERIOD_S = 1.0
_REPLY_S = 10.0
_PATIENCE_S = 60.0


class Totals(NamedTuple):
    """What replicas have done since the start: tokens looked up in prefix caches, those found, adapters loaded."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    adapter_loads: int = 0


class ReplicaWatch:
    """The latest status of each replica.

    Args:
        say: Told when there are more or fewer.

    Attributes:
        latest: By name of the replica.
        gone: Whether no replica has answered for a minute.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.latest: dict[str, WorkerStatus] = {}
        self.gone = False
        self._say = say
        self._seen_s = time.monotonic()
        self._ended = Totals()

    def totals(self) -> Totals:
        """Return the totals of all replicas, ended ones included."""
        return _sum([self._ended, *map(_totals, self.latest.values())])

    async def keep_polling(self, handle: Any, give_up: Callable[[], None]) -> None:
        """Poll until cancelled; calls `give_up` each time when no replica has answered for a minute."""
        while True:
            await self.poll(handle)
            self.gone = time.monotonic() - self._seen_s > _PATIENCE_S
            if self.gone:
                give_up()
            await asyncio.sleep(_PERIOD_S)

    async def poll(self, handle: Any) -> None:
        """Ask every replica how it is."""
        try:
            replies = await handle.broadcast("status").results_async(timeout_s=_REPLY_S, return_exceptions=True)
        except TimeoutError:
            return  # one replica that does not reply delays all replies; Ray Serve's own checks will replace it
        except Exception:  # noqa: BLE001 - whatever it was, polling must go on
            replies = []
        self._update({reply.name: reply for reply in replies if isinstance(reply, WorkerStatus)})

    def _update(self, found: dict[str, WorkerStatus]) -> None:
        lost = [_totals(replica) for name, replica in self.latest.items() if name not in found]
        before = set(self.latest)
        self._ended, self.latest = _sum([self._ended, *lost]), found
        if found:
            self._seen_s = time.monotonic()
        if before != set(found):
            count = len(found)
            self._say(f"{count} replica{' answers' if count == 1 else 's answer'} requests.")


def _totals(replica: WorkerStatus) -> Totals:
    engine = replica.engine or EngineStatus()
    return Totals(engine.prefix_queries, engine.prefix_hits, engine.adapter_loads)


def _sum(parts: Iterable[Totals]) -> Totals:
    return Totals(*map(sum, zip(*parts, strict=True)))
