"""Carries stream chunks from the engine's thread to the event loop, where each waits until it is read.

Waking the loop costs a system call. In each step the engine delivers a chunk to every running request, so the bridge
wakes the loop once for all that have gathered. When many chunks of an answer wait, they are joined.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from haori.serve.request import Deliver, StreamChunk

__all__ = ["ChoiceChunk", "ChunkQueue", "StreamBridge"]

_SEPARATE_TOKENS = 32  # waiting tokens up to which chunks stay as they came
_JOINED_TOKENS = 64  # most tokens of a joined chunk: a client gets them in one event


class ChoiceChunk(NamedTuple):
    """A stream chunk of the answer number `choice` of an HTTP request."""

    choice: int
    chunk: StreamChunk


class ChunkQueue:
    """The unread chunks of one HTTP request. Lives on the event loop.

    Args:
        changed: Called whenever chunks were added or read.

    Attributes:
        tokens: Number of unread tokens.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.tokens = 0
        self._changed = changed
        self._entries: deque[list[ChoiceChunk]] = deque()  # lists of one, so that a joined chunk can replace it
        self._newest: dict[int, list[ChoiceChunk]] = {}
        self._reader: asyncio.Future[None] | None = None

    def put(self, entry: ChoiceChunk) -> None:
        """Add a chunk."""
        newest = self._newest.get(entry.choice) if self.tokens > _SEPARATE_TOKENS else None
        self.tokens += len(entry.chunk.tokens)
        if newest is not None and len(newest[0].chunk.tokens) < _JOINED_TOKENS and entry.chunk.finish is None:
            newest[0] = ChoiceChunk(entry.choice, _joined(newest[0].chunk, entry.chunk))
        else:
            self._newest[entry.choice] = newest = [entry]
            self._entries.append(newest)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        self._changed()

    async def get(self) -> ChoiceChunk:
        """Return the next chunk, once there is one. Only one reader may wait."""
        if self._entries:
            await asyncio.sleep(0)  # lets other tasks run, and a disconnected client be noticed
        while not self._entries:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        held = self._entries.popleft()
        entry = held[0]
        if self._newest.get(entry.choice) is held:
            del self._newest[entry.choice]
        self.tokens -= len(entry.chunk.tokens)
        self._changed()
        return entry

    def clear(self) -> None:
        """Drop all unread chunks."""
        self._entries.clear()
        self._newest.clear()
        self.tokens = 0


def _joined(first: StreamChunk, second: StreamChunk) -> StreamChunk:
    return replace(
        second,
        text=first.text + second.text,
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
    )


class StreamBridge:
    """The way from any thread into one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[ChunkQueue, ChoiceChunk]] = deque()
        self._scheduled = False

    def sender(self, queue: ChunkQueue, choice: int) -> Deliver:
        """Return what the engine calls with each chunk of an answer; it never blocks and never raises."""

        def deliver(chunk: StreamChunk) -> None:
            self._waiting.append((queue, ChoiceChunk(choice, chunk)))
            if not self._scheduled:
                self._scheduled = True
                with suppress(RuntimeError):  # the loop is closed, so nobody waits for the chunk
                    self._loop.call_soon_threadsafe(self._dispatch)

        return deliver

    def _dispatch(self) -> None:
        self._scheduled = False  # first, so that a chunk which comes from now on schedules again
        while self._waiting:
            queue, entry = self._waiting.popleft()
            queue.put(entry)
