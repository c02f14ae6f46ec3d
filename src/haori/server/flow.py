"""Flow control: answers that are written faster than their client reads them are paused, which bounds what waits.

When many tokens wait for a client, the engine pauses its requests, which then use none of the engine's memory and no
slot of the batch; once the client has read most of them, the requests go on. An engine that cannot pause keeps
writing; if far too many tokens wait, or a client reads nothing for long, the answers end with an error.
"""

import asyncio
import time
from collections.abc import Callable, Collection

from haori.server.contracts import Engine

__all__ = ["Flow"]

_WAITING = 512  # tokens that may wait for a client
_EACH = 64  # or so many for each of its answers, if that is more
_FAR_TOO_MUCH = 8  # the answers end when so many times as many wait
_PATIENCE_S = 300.0
_CHECK_EVERY_S = 1.0


class Flow:
    """Flow control of the answers to one HTTP request. Lives on the event loop.

    Args:
        engine: Writes the answers.
        running: Returns the ids of the engine's requests that have not ended.
        give_up: Called with a sentence when the answers must end.
    """

    def __init__(self, engine: Engine, running: Callable[[], Collection[str]], give_up: Callable[[str], None]) -> None:
        self._engine = engine
        self._running = running
        self._give_up = give_up
        self._most = _WAITING
        self._waiting = 0
        self._paused: Collection[str] = ()
        self._read_s = 0.0  # when the client last read something, while its requests are paused
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, answers: int) -> None:
        """Set the limit for so many answers."""
        self._most = max(_WAITING, _EACH * answers)

    def regulate(self, waiting: int) -> None:
        """Pause or resume the requests, now that so many tokens wait."""
        before, self._waiting = self._waiting, waiting
        if self._timer is None:
            if waiting > self._most:
                self._pause()
        elif waiting < before:
            self._read_s = time.monotonic()
            if waiting <= self._most // 4:
                for identity in self._paused:
                    self._engine.resume(identity)
                self.close()

    def close(self) -> None:
        """Stop checking: the paused requests go on, or have ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pause(self) -> None:
        self._paused = tuple(self._running())
        for identity in self._paused:
            self._engine.pause(identity)
        self._read_s = time.monotonic()
        self._schedule_check()

    def _schedule_check(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_CHECK_EVERY_S, self._check)

    def _check(self) -> None:
        """End the answers if far too many tokens wait, or nothing was read for long."""
        if self._waiting > _FAR_TOO_MUCH * self._most:
            sentence = f"{self._waiting:,} tokens of the answer wait to be read, and no more can; read faster."
        elif time.monotonic() - self._read_s > _PATIENCE_S:
            sentence = f"Nothing of the answer was read for {_PATIENCE_S:.0f} seconds, so it was ended."
        else:
            self._schedule_check()
            return
        self._timer = None
        self._give_up(sentence)
