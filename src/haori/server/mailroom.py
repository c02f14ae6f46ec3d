"""Brings pieces of answers from the engine's thread to the event loop, where each waits until it is read.

Waking the loop costs a system call. The engine delivers a piece to each running request in one go, so the mailroom
wakes the loop once for all that has gathered. Where many pieces of an answer wait, they become one.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from haori.serve.request import Deliver, Delta

__all__ = ["Inbox", "Mailroom", "Piece"]

_SINGLE = 32  # tokens that wait as they came
_TOGETHER = 64  # tokens in a piece of several: a client gets them in one event


class Piece(NamedTuple):
    """A piece of the answer number `choice` of an HTTP request."""

    choice: int
    delta: Delta


class Inbox:
    """The pieces of one HTTP request that have come and were not read yet. Lives on the event loop.

    Args:
        changed: Called when there are more or fewer.

    Attributes:
        tokens: Tokens that wait.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.tokens = 0
        self._changed = changed
        self._pieces: deque[list[Piece]] = deque()  # in a list of one each, to be replaced
        self._newest: dict[int, list[Piece]] = {}
        self._reader: asyncio.Future[None] | None = None

    def put(self, piece: Piece) -> None:
        """Take in a piece."""
        held = self._newest.get(piece.choice) if self.tokens > _SINGLE else None
        self.tokens += len(piece.delta.tokens)
        if held is not None and len(held[0].delta.tokens) < _TOGETHER and piece.delta.finish is None:
            held[0] = Piece(piece.choice, _joined(held[0].delta, piece.delta))
        else:
            self._newest[piece.choice] = held = [piece]
            self._pieces.append(held)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        self._changed()

    async def get(self) -> Piece:
        """Return the next piece, once there is one. Only one reader may wait."""
        if self._pieces:
            await asyncio.sleep(0)  # others have a turn, and a client that has left is noticed
        while not self._pieces:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        held = self._pieces.popleft()
        piece = held[0]
        if self._newest.get(piece.choice) is held:
            del self._newest[piece.choice]
        self.tokens -= len(piece.delta.tokens)
        self._changed()
        return piece

    def clear(self) -> None:
        """Drop what waits."""
        self._pieces.clear()
        self._newest.clear()
        self.tokens = 0


def _joined(one: Delta, other: Delta) -> Delta:
    return replace(
        other,
        text=one.text + other.text,
        tokens=one.tokens + other.tokens,
        logprobs=one.logprobs + other.logprobs,
        prompt_logprobs=one.prompt_logprobs + other.prompt_logprobs,
    )


class Mailroom:
    """The way from any thread into one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[Inbox, Piece]] = deque()
        self._called = False

    def sender(self, inbox: Inbox, index: int) -> Deliver:
        """Return what the engine calls with each piece; it never blocks and never fails."""

        def deliver(delta: Delta) -> None:
            self._waiting.append((inbox, Piece(index, delta)))
            if not self._called:
                self._called = True
                with suppress(RuntimeError):  # the loop is closed: nobody waits for the piece
                    self._loop.call_soon_threadsafe(self._hand_out)

        return deliver

    def _hand_out(self) -> None:
        self._called = False  # first, so that a piece that comes from now on calls again
        while self._waiting:
            inbox, piece = self._waiting.popleft()
            inbox.put(piece)
