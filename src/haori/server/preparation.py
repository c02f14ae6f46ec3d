"""Threads that prepare requests for the engine: look names up, render and tokenise prompts, compile schemas.

Prompts are prepared by one thread, as tokenizers are not thread-safe. Requests with a schema or grammar have another
one, as compiling it may take seconds. Each has a queue of bounded length, which no API key can fill alone.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from haori.serve.engine.queue_share import check_share

__all__ = ["Preparation"]

_T = TypeVar("_T")
_SCHEMAS = 32
_RETRY_S = 1.0


class Preparation:
    """The preparing threads of one server.

    Args:
        waiting: Most requests that are prepared or wait to be.
    """

    def __init__(self, waiting: int) -> None:
        self.tokenizing = threading.Lock()
        self._lanes = {False: _Lane("prepare", waiting), True: _Lane("compile", min(_SCHEMAS, waiting))}

    def run(self, owner: str, job: Callable[[], _T], *, compiles: bool = False) -> "asyncio.Future[_T]":
        """Do a job on a preparing thread.

        Args:
            owner: Whose it is.
            job: The job; it holds `tokenizing` while it uses the tokenizer.
            compiles: Whether a schema or grammar has to be compiled.

        Raises:
            OverloadedError: Too many wait.
        """
        return asyncio.wrap_future(self._lanes[compiles].submit(owner, job))

    def drain(self) -> None:
        """Wait until all jobs that were accepted have ended."""
        for lane in self._lanes.values():
            lane.drain()

    def close(self) -> None:
        """Accept no more jobs."""
        for lane in self._lanes.values():
            lane.close()


class _Lane:
    """A thread and the queue in front of it."""

    def __init__(self, name: str, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"haori-{name}")
        self._lock = threading.Lock()
        self._capacity = waiting
        self._waiting: Counter[str] = Counter()

    def submit(self, owner: str, job: Callable[[], _T]) -> "Future[_T]":
        with self._lock:
            own, waiting = self._waiting[owner], self._waiting.total()
            check_share(owner, own, waiting, self._capacity, retry_after_s=_RETRY_S, why="to be prepared")
            self._waiting[owner] += 1
        future = self._pool.submit(job)
        future.add_done_callback(lambda _: self._leave(owner))
        return future

    def _leave(self, owner: str) -> None:
        with self._lock:
            self._waiting[owner] -= 1
            if not self._waiting[owner]:
                del self._waiting[owner]

    def drain(self) -> None:
        self._pool.submit(lambda: None).result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
