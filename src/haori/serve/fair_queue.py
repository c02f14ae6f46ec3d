"""Whose turn is it? Requests wait in one queue per model name, and the queue that was served least goes first.

The counter of a queue is the tokens it was served (virtual token counter, Sheng et al., OSDI 2024): a name that gets
ten times the requests of others waits for itself, not they for it. A queue that was idle starts at the smallest
counter in use, so idleness earns nothing; and each second of waiting counts like tokens served to others, so that in
the end everything gets its turn.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

_T = TypeVar("_T")
_AGEING_TOKENS_PER_S = 50.0


class FairQueue(Generic[_T]):
    """Items that wait, by queue.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[str, deque[tuple[float, _T]]] = {}
        self._served: dict[str, float] = {}
        self._active: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[_T]:
        return (item for queue in self._waiting.values() for _, item in queue)

    def add(self, queue: str, item: _T, *, first: bool = False) -> None:
        """Let an item wait; `first` puts one that was interrupted back in front."""
        if queue not in self._waiting:
            self._waiting[queue] = deque()
            if queue not in self._active:
                others = [self._served[name] for name in {*self._waiting, *self._active} if name in self._served]
                self._served[queue] = max(self._served.get(queue, 0.0), min(others, default=0.0))
        entry = (self._clock(), item)
        if first:
            self._waiting[queue].appendleft(entry)
        else:
            self._waiting[queue].append(entry)

    def in_turn(self) -> list[str]:
        """Return the queues with somebody waiting, the one whose turn it is first."""
        now = self._clock()

        def turn(queue: str) -> float:
            return self._served[queue] - _AGEING_TOKENS_PER_S * (now - self._waiting[queue][0][0])

        return sorted(self._waiting, key=turn)

    def peek(self, queue: str) -> _T:
        """Return the first item of a queue."""
        return self._waiting[queue][0][1]

    def take(self, queue: str) -> _T:
        """Take the first item of a queue; it counts as being served until `leave`."""
        _, item = self._waiting[queue].popleft()
        self._active[queue] = self._active.get(queue, 0) + 1
        if not self._waiting[queue]:
            del self._waiting[queue]
        return item

    def serve(self, queue: str, tokens: int) -> None:
        """Count tokens that a queue was served."""
        self._served[queue] = self._served.get(queue, 0.0) + tokens

    def leave(self, queue: str) -> None:
        """Say that an item that was taken is done with."""
        self._active[queue] -= 1
        if not self._active[queue]:
            del self._active[queue]
            if queue not in self._waiting:
                # A name that comes back is set to the others' counter; nothing need be remembered of it.
                del self._served[queue]

    def remove(self, queue: str, wanted: _T) -> None:
        """Take a waiting item out of its queue, if it is there."""
        for entry in self._waiting.get(queue, ()):
            if entry[1] is wanted:
                self._waiting[queue].remove(entry)
                break
        if queue in self._waiting and not self._waiting[queue]:
            del self._waiting[queue]
            if queue not in self._active:
                del self._served[queue]
