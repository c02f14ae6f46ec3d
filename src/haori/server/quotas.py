"""Limits of each API key: concurrent answers, and tokens per minute.

Tokens come from a bucket that fills evenly and holds a minute's worth (token bucket). A request is accepted while the
bucket is not empty; it takes its prompt's tokens at once and those of its answers as they come, so the bucket may be
overdrawn, and the next request is refused until it has filled up again. Counts end with the server process.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from haori.server.errors import ApiError
from haori.server.keys import ApiKey

__all__ = ["Grant", "Quotas"]

_RETRY_S = 1.0


@dataclass
class _Use:
    answers: int = 0
    left: float = 0.0
    filled_s: float | None = None


class Grant:
    """The permission for some concurrent answers, until it is closed."""

    def __init__(self, spend: Callable[[int], None], close: Callable[[], None]) -> None:
        self._spend = spend
        self._close: Callable[[], None] | None = close

    def spend(self, tokens: int) -> None:
        """Count tokens that were prefilled or generated."""
        self._spend(tokens)

    def close(self) -> None:
        """Return the permission; a second call does nothing."""
        close, self._close = self._close, None
        if close is not None:
            close()


class Quotas:
    """The usage of all keys of one server; every method may be called from any thread.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._uses: dict[str, _Use] = {}  # by hash, for keys with limits only

    def check(self, key: ApiKey | None, answers: int = 1) -> None:
        """Refuse a request of a key that has reached a limit.

        Raises:
            ApiError: It asks for more answers than the key ever may have (400), or than it may now, or the key has
                no tokens left (429).
        """
        with self._lock:
            self._check(key, answers)

    def open(self, key: ApiKey | None, answers: int) -> Grant:
        """Accept a request of a key.

        Raises:
            ApiError: As for `check`.
        """
        if key is None or (key.max_concurrent is None and key.tokens_per_minute is None):
            return Grant(lambda _: None, lambda: None)
        identity = key.hash
        with self._lock:
            self._check(key, answers)
            self._uses.setdefault(identity, _Use()).answers += answers
        return Grant(lambda tokens: self._change(identity, tokens=tokens), lambda: self._change(identity, -answers))

    def _change(self, identity: str, answers: int = 0, tokens: int = 0) -> None:
        with self._lock:
            use = self._uses[identity]
            use.answers += answers
            use.left -= tokens

    def _check(self, key: ApiKey | None, answers: int) -> None:
        if key is None:
            return
        most, rate = key.max_concurrent, key.tokens_per_minute
        if most is not None:
            used = self._uses.get(key.hash, _Use()).answers
            if answers > most:
                message = f"{answers} answers were asked for; the API key {key.name!r} may have {most} at once."
                raise ApiError(400, message, code="invalid_value", param="n")
            if used + answers > most:
                message = (
                    f"The API key {key.name!r} has {used} answers under way and may have {most} at once "
                    "(--max-concurrent); ask again when one has ended."
                )
                raise ApiError(429, message, code="key_concurrency_exceeded", retry_after_s=_RETRY_S)
        if rate is not None:
            left = self._fill(key.hash, rate)
            if left <= 0:
                wait = (1.0 - left) * 60.0 / rate
                message = (
                    f"The API key {key.name!r} has used its {rate:,} tokens a minute (--tokens-per-minute); ask again "
                    f"in {max(1, round(wait))} s."
                )
                raise ApiError(429, message, code="key_tokens_exceeded", retry_after_s=wait)

    def _fill(self, identity: str, rate: int) -> float:
        """Fill a key's bucket for the time that has passed; return what is in it."""
        now = self._clock()
        use = self._uses.setdefault(identity, _Use())
        if use.filled_s is None:
            use.left = rate
        else:
            use.left += (now - use.filled_s) * rate / 60.0
        use.filled_s = now
        use.left = min(use.left, float(rate))
        return use.left
