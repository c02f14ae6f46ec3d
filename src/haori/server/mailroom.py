"""Brings pieces of answers from the engine's thread to the event loop.

Waking the loop costs a system call. The engine delivers a piece to each running request in one go, so the mailroom
wakes the loop once for all that has gathered.
"""

import asyncio
from collections import deque
from contextlib import suppress
from typing import NamedTuple

from haori.serve.request import Deliver, Delta

__all__ = ["Inbox", "Mailroom", "Piece"]


class Piece(NamedTuple):
    """A piece of the answer number `choice` of an HTTP request."""

    choice: int
    delta: Delta


Inbox = asyncio.Queue[Piece]


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
            inbox.put_nowait(piece)
