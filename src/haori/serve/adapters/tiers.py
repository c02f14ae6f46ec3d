"""Which adapters are in memory: read from disk in the background, evicted by last use, pinned on demand.

Only the engine's thread calls this, except for `check` and `put_live`. Files are read on threads of their own, so a
step never waits for a disk.
"""

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from haori.core.errors import FileFormatError, HaoriError, InputError, StorageError
from haori.serve.engine.runner import AdapterBank, ReadyAdapter
from haori.serve.engine.unforeseen import unforeseen
from haori.serve.kernels.openmp import compute_alone
from haori.serve.request import BASE, AdapterMix

if TYPE_CHECKING:
    from haori.library import AdapterFiles
    from haori.serve.adapters.reading import AdapterWeights

__all__ = ["AdapterTiers", "FindFiles", "PinnedAdapters", "ReadAdapter"]

FindFiles = Callable[[str], "AdapterFiles"]
"""Finds an adapter's files by its content id."""

ReadAdapter = Callable[["AdapterFiles", str], "AdapterWeights"]
"""Reads an adapter, given its files and its content id."""

PinnedAdapters = Callable[[], Collection[str]]
"""Returns the content ids of adapters that are never evicted; called each time room is made."""

_READERS = 2


@dataclass
class _Resident:
    size_bytes: int
    came_s: float
    users: int = 0
    used: int = 0


class AdapterTiers:
    """Adapters in memory and on disk.

    Args:
        bank: Where adapters in memory are.
        find: Finds an adapter's files.
        read: Reads them.
        budget_bytes: Memory they may take together.
        landed: Called on a reader's thread when an adapter was read.
        pinned: Adapters that are never evicted.
    """

    def __init__(
        self,
        bank: AdapterBank,
        find: FindFiles,
        read: ReadAdapter,
        budget_bytes: int,
        *,
        landed: Callable[[], None] = lambda: None,
        pinned: PinnedAdapters = tuple,
    ) -> None:
        self._bank = bank
        self._find = find
        self._read = read
        self.budget_bytes = budget_bytes
        self._landed = landed
        self.pinned = pinned
        self._live: dict[str, ReadyAdapter] = {}
        self._dropped: set[str] = set()
        self._resident: dict[str, _Resident] = {}
        self._coming: dict[str, Future[ReadyAdapter]] = {}
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="haori-adapter", initializer=compute_alone)
        self._favoured: AdapterMix = BASE
        self._leaving: frozenset[str] = frozenset()
        self._clock = 0
        self.loads = 0
        self.evictions = 0

    @property
    def used_bytes(self) -> int:
        """Memory of the adapters in memory."""
        return sum(resident.size_bytes for resident in self._resident.values())

    @property
    def resident(self) -> tuple[str, ...]:
        """Content ids of the adapters in memory."""
        return tuple(self._resident)

    def prepare(self, mix: AdapterMix) -> bool:
        """Say whether all adapters of a mix are in memory and may be used; begin to read those that are not.

        Raises:
            HaoriError: One of them cannot be read or applied, for whatever reason, or they do not fit into the budget
                together. Nothing of it is kept, so it is read anew for the next request.
        """
        if mix != self._favoured and any(adapter in self._leaving for adapter, _ in mix):
            return False
        self._clock += 1
        for adapter, _ in mix:
            if adapter in self._resident:
                self._resident[adapter].used = self._clock
        ready = True
        for adapter, _ in mix:
            if adapter not in self._resident and not self._load(adapter, mix):
                ready = False
        return ready

    def lacks_room(self, mix: AdapterMix) -> bool:
        """Say whether the adapters of a mix were read and only lack room in memory."""
        absent = [self._coming.get(adapter) for adapter, _ in mix if adapter not in self._resident]
        return bool(absent) and all(future is not None and future.done() for future in absent)

    def make_way(self, mix: AdapterMix | None, at_least_s: float) -> Collection[str]:
        """Reserve free memory for a mix that lacks room, until the next call, and choose which adapters must go.

        They are those with the fewest users, and get no new ones. An adapter stays in memory for at least `at_least_s`,
        so that two adapters which take turns do some work in between.

        Returns:
            The adapters that must go; none without a mix, or if there is enough room already.
        """
        self._favoured, self._leaving = BASE, frozenset()
        if mix is None:
            return self._leaving
        staying = {name for name, _ in mix} | set(self.pinned())
        lacking = sum(
            self._coming[name].result().size_bytes
            for name, _ in mix
            if name in self._coming and self._coming[name].exception() is None
        )
        lacking -= self.budget_bytes - self.used_bytes
        old = time.monotonic() - at_least_s
        may_go = [name for name, held in self._resident.items() if name not in staying and held.came_s <= old]
        leaving = []
        for name in sorted(may_go, key=lambda name: (self._resident[name].users, self._resident[name].used)):
            if lacking <= 0:
                break
            leaving.append(name)
            lacking -= self._resident[name].size_bytes
        if lacking <= 0:
            self._favoured, self._leaving = mix, frozenset(leaving)
        return self._leaving

    def check(self, files: "AdapterFiles", adapter: str) -> None:
        """Refuse an adapter that no request could be answered with: it is read as for one, and dropped again.

        May be called from any thread.

        Raises:
            HaoriError: It is one.
        """

        def read() -> None:
            ready = self._bank.prepare(self._read(files, adapter))
            if ready.size_bytes > self.budget_bytes:
                raise InputError(
                    f"The adapter takes {ready.size_bytes / 1e6:,.0f} MB; all adapters in memory may take "
                    f"{self.budget_bytes / 1e6:,.0f} MB (--adapter-memory)."
                )

        with ThreadPoolExecutor(1, thread_name_prefix="haori-adapter-check", initializer=compute_alone) as alone:
            try:
                alone.submit(read).result()
            except HaoriError:
                raise
            except Exception as error:  # a file from elsewhere may raise anything
                raise FileFormatError(unforeseen(error)) from error

    def put_live(self, weights: "AdapterWeights") -> None:
        """Keep an adapter that has no files, until `drop_live`; it comes into memory as one that was read.

        May be called from any thread.

        Raises:
            InputError: There is one of this id.
            MismatchError: The runner cannot apply it.
        """
        ready = self._bank.prepare(weights)
        if self._live.setdefault(weights.id, ready) is not ready:
            raise InputError(f"There is an adapter {weights.id!r} already; put the new weights under a new id.")

    def drop_live(self, adapter: str) -> None:
        """Forget such an adapter, as soon as no request uses it."""
        self._live.pop(adapter, None)
        self._coming.pop(adapter, None)
        if adapter in self._resident:
            self._dropped.add(adapter)
            self._let_go(adapter)

    def _let_go(self, adapter: str) -> None:
        if adapter in self._dropped and not self._resident[adapter].users:
            self._dropped.remove(adapter)
            del self._resident[adapter]
            self._bank.drop(adapter)

    def acquire(self, mix: AdapterMix) -> None:
        """Keep the adapters of a mix, which are in memory, until `release`."""
        for adapter, _ in mix:
            self._resident[adapter].users += 1

    def release(self, mix: AdapterMix) -> None:
        """Release the adapters of a mix."""
        for adapter, _ in mix:
            self._resident[adapter].users -= 1
            self._let_go(adapter)

    def close(self) -> None:
        """End the readers."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _load(self, adapter: str, mix: AdapterMix) -> bool:
        """Begin to read an adapter, or keep it once it has been read; True when it is in memory."""
        future = self._coming.get(adapter)
        if future is None:
            if len(self._coming) < 2 * _READERS:
                future = self._coming[adapter] = self._readers.submit(self._make_ready, adapter)
                future.add_done_callback(lambda _: self._landed())
            return False
        if not future.done():
            return False
        waits = False
        try:
            waits = not self._make_resident(adapter, future.result(), mix)
        except (HaoriError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            raise _in_words(adapter, error) from error
        finally:
            if not waits:
                del self._coming[adapter]
        return not waits

    def _make_resident(self, adapter: str, ready: ReadyAdapter, mix: AdapterMix) -> bool:
        """Put an adapter that was read into the bank; False if there is no room for it now."""
        size = ready.size_bytes
        staying = {name for name, _ in mix} | set(self.pinned())
        others = sum(self._resident[name].size_bytes for name in staying if name in self._resident)
        if size + others > self.budget_bytes:
            raise InputError(
                f"The adapters of this request and those pinned take {(size + others) / 1e6:,.0f} MB; all "
                f"adapters in memory may take {self.budget_bytes / 1e6:,.0f} MB (--adapter-memory)."
            )
        if self._favoured not in (BASE, mix) or not self._make_room(size, staying):
            return False
        try:
            self._bank.put(ready)
        except BaseException:
            with suppress(Exception):  # it may be half there
                self._bank.drop(adapter)
            raise
        self._resident[adapter] = _Resident(size, time.monotonic(), used=self._clock)
        self.loads += 1
        return True

    def _make_ready(self, adapter: str) -> ReadyAdapter:
        if (live := self._live.get(adapter)) is not None:
            return live
        return self._bank.prepare(self._read(self._find(adapter), adapter))

    def forget_unwanted(self, wanted: Collection[str]) -> None:
        """Drop adapters that were read for requests which no longer wait."""
        for adapter in [name for name, future in self._coming.items() if future.done() and name not in wanted]:
            del self._coming[adapter]

    def _make_room(self, size: int, keep: Collection[str]) -> bool:
        """Evict adapters, the least recently used first; False if those in use leave no room."""
        idle = sorted(
            (resident.used, name)
            for name, resident in self._resident.items()
            if not resident.users and name not in keep
        )
        free = self.budget_bytes - self.used_bytes
        going = []
        for _, name in idle:
            if free >= size:
                break
            going.append(name)
            free += self._resident[name].size_bytes
        if free < size:
            return False
        for name in going:
            self._dropped.discard(name)
            del self._resident[name]
            self.evictions += 1
            self._bank.drop(name)
        return True


def _in_words(adapter: str, error: BaseException) -> HaoriError:
    """Return the error for which an adapter cannot be served, given what was raised."""
    if isinstance(error, OSError):
        return StorageError(f"The adapter {adapter[:19]} cannot be read: {error}.")
    if isinstance(error, MemoryError):
        return HaoriError(f"There is not enough memory for the adapter {adapter[:19]}; ask again, or serve fewer.")
    return FileFormatError(
        f"The adapter {adapter[:19]} cannot be made ready ({type(error).__name__}: {error}); see that its files are "
        "what training wrote."
    )
