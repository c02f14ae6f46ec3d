"""Fair turns: requests wait in a queue for each owner and model name; owners take turns, and so do their queues.

The counter of an owner, and of each of its queues, is the tokens it was served (virtual token counter, Sheng et al.,
OSDI 2024): an owner that asks for ten times as much as others delays its own requests, not theirs. Whoever begins to
wait starts at the smallest counter of those that wait, so neither being idle nor asking for little earns credit.

Waiting is counted in the tokens that everybody was served meanwhile, and taken off the counter. Among the queues of one
owner the first few thousand count in full, for a name that many ask for stands for many users: they wait a few times as
long as those of a rare name, not twenty times, and yet a thousand requests for one name delay no others. All others
count a little, which is enough for everything to get its turn.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["FairQueue", "QueueKey"]

_T = TypeVar("_T")
_AGEING = 0.05
_IN_FULL_TOKENS = 4096.0

QueueKey = tuple[str, str]
"""An owner and the name of one of its queues."""


class _Counters:
    """Tokens served, by name."""

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self._floor = 0.0  # counter of the one whose turn it was last

    def enter(self, name: str, waiting: Iterable[str]) -> None:
        """Set the counter of a name that begins to wait beside others."""
        floor = min((self.served[other] for other in waiting), default=self._floor)
        self.served[name] = max(self.served.get(name, floor), floor)

    def take(self, name: str) -> None:
        """Note whose turn it was."""
        self._floor = self.served[name]


class _Owner(Generic[_T]):
    """The queues of one owner: items with the tokens that everybody had been served when each came."""

    def __init__(self) -> None:
        self.counters = _Counters()
        self.waiting: dict[str, deque[tuple[float, _T]]] = {}
        self.active: Counter[str] = Counter()

    @property
    def oldest(self) -> float:
        """When the item that has waited longest came."""
        return min(queue[0][0] for queue in self.waiting.values())


class FairQueue(Generic[_T]):
    """Waiting items, by owner and queue."""

    def __init__(self) -> None:
        self._owners: dict[str, _Owner[_T]] = {}
        self._counters = _Counters()
        self._total = 0.0

    def __len__(self) -> int:
        return sum(len(queue) for owner in self._owners.values() for queue in owner.waiting.values())

    def __iter__(self) -> Iterator[_T]:
        return (item for owner in self._owners.values() for queue in owner.waiting.values() for _, item in queue)

    def add(self, key: QueueKey, item: _T, *, first: bool = False) -> None:
        """Add an item; `first` puts one that was preempted back in front."""
        name, queue = key
        owner = self._owners.setdefault(name, _Owner())
        if not owner.waiting:
            self._counters.enter(name, [other for other, held in self._owners.items() if held.waiting])
        if queue not in owner.waiting:
            owner.counters.enter(queue, owner.waiting)
            owner.waiting[queue] = deque()
        entry = (self._total, item)
        if first:
            owner.waiting[queue].appendleft(entry)
        else:
            owner.waiting[queue].append(entry)

    def in_turn(self) -> list[QueueKey]:
        """Return the queues with waiting items, the one whose turn it is first."""

        def turn(key: QueueKey) -> tuple[float, float]:
            owner = self._owners[key[0]]
            waited = self._total - owner.waiting[key[1]][0][0]
            return of_owner[key[0]], owner.counters.served[key[1]] - min(waited, _IN_FULL_TOKENS) - _AGEING * waited

        waiting = {name: owner for name, owner in self._owners.items() if owner.waiting}
        of_owner = {
            name: self._counters.served[name] - _AGEING * (self._total - owner.oldest)
            for name, owner in waiting.items()
        }
        return sorted(((name, queue) for name, owner in waiting.items() for queue in owner.waiting), key=turn)

    def heads(self) -> list[_T]:
        """Return the first item of each queue."""
        return [queue[0][1] for owner in self._owners.values() for queue in owner.waiting.values()]

    def peek(self, key: QueueKey) -> _T:
        """Return the first item of a queue."""
        return self._owners[key[0]].waiting[key[1]][0][1]

    def take(self, key: QueueKey) -> _T:
        """Take the first item of a queue; it counts as being served until `leave`."""
        name, queue = key
        owner = self._owners[name]
        _, item = owner.waiting[queue].popleft()
        owner.active[queue] += 1
        owner.counters.take(queue)
        self._counters.take(name)
        if not owner.waiting[queue]:
            del owner.waiting[queue]
        return item

    def serve(self, key: QueueKey, tokens: int) -> None:
        """Count tokens that a queue was served while one of its items is."""
        name, queue = key
        self._total += tokens
        self._counters.served[name] += tokens
        self._owners[name].counters.served[queue] += tokens

    def leave(self, key: QueueKey) -> None:
        """Note that an item which was taken has ended."""
        self._owners[key[0]].active[key[1]] -= 1
        self._tidy(key)

    def remove(self, key: QueueKey, wanted: _T) -> None:
        """Take a waiting item out of its queue, if it is there."""
        owner = self._owners.get(key[0])
        queue = None if owner is None else owner.waiting.get(key[1])
        if owner is None or queue is None:
            return
        for entry in queue:
            if entry[1] is wanted:
                queue.remove(entry)
                break
        if not queue:
            del owner.waiting[key[1]]
            self._tidy(key)

    def _tidy(self, key: QueueKey) -> None:
        """Forget a queue, and an owner, of which nothing waits or runs; its counter will start anew."""
        name, queue = key
        owner = self._owners[name]
        if queue not in owner.waiting and not owner.active[queue]:
            del owner.active[queue]
            del owner.counters.served[queue]
        if not owner.waiting and not owner.active:
            del self._owners[name]
            del self._counters.served[name]
