"""What the library and the registered names hold now, read again only when their files changed.

Looking costs a few `stat` calls. Modification times are coarse, so files that changed a moment ago are read again
until they have rested. A change that is going on in the library is not waited for; one that was abandoned by a killed
process is mended in the background.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from haori.core.errors import HaoriError
from haori.library import Library, Names
from haori.serve.adapters.registered import Registered, RegisteredFile, is_inside

__all__ = ["LibraryWatch", "View"]

_REST_S = 0.1
_ABANDONED_S = 10.0
_UNWATCHED_S = 1.0


class View(NamedTuple):
    """What was there at one moment.

    Attributes:
        names: The library's.
        full_names: Every name that an adapter can be asked for by, in full, by content id.
        ids: Content ids of the library.
        registered: What each registered name stands for.
        stamp: Changes with the files.
    """

    names: Names
    full_names: Mapping[str, tuple[str, ...]]
    ids: frozenset[str]
    registered: Mapping[str, Registered]
    stamp: object


class LibraryWatch:
    """Keeps the latest view; may be asked from any thread.

    Args:
        library: The library.
        file: The registered names.
        roots: Folders that registered adapters may lie in.
    """

    def __init__(self, library: Library, file: RegisteredFile, roots: Sequence[Path]) -> None:
        self._library = library
        self._file = file
        self._roots = roots
        self._lock = threading.Lock()
        self._mender: threading.Thread | None = None
        self._latest: View | None = None

    def view(self) -> View:
        """Return what is there now.

        Raises:
            LibraryError: The library's history of promotions is damaged.
            StorageError: The file of registered names is.
        """
        self._mend_abandoned()
        if (latest := self._current()) is not None:
            return latest
        with self._lock:
            if (latest := self._current()) is not None:
                return latest
            stamp = self._stamp()  # before reading: what changes meanwhile is seen the next time
            names = self._library.names(wait=self._latest is None)
            ids = frozenset(row.adapter for row in names.rows)
            registered = {
                name: entry
                for name, entry in self._file.read().items()
                if (entry.adapter in ids if entry.stamp is None else is_inside(entry.folder, self._roots))
            }
            self._latest = View(names, _full_names(names, registered), ids, registered, stamp)
            return self._latest

    def _current(self) -> View | None:
        latest = self._latest
        return latest if latest is not None and latest.stamp is not None and latest.stamp == self._stamp() else None

    def _stamp(self) -> object:
        """Return what changes with the files; None if they changed so recently that a further change may not show."""
        stats = [_stat(path) for path in (*self._library.watched, self._file.path)]
        if any(stat is not None and abs(time.time_ns() - stat[2]) < _REST_S * 1e9 for stat in stats):
            return None
        if stats[0] is None and (self._library.root / "adapters").exists():
            # Without an index, on a disk that cannot be written to, every look reads all cards.
            return int(time.monotonic() / _UNWATCHED_S)
        return tuple(stats)

    def _mend_abandoned(self) -> None:
        try:
            age_s = time.time() - self._library.mark.stat().st_mtime
        except OSError:
            return
        if age_s < _ABANDONED_S:
            return
        if self._mender is None or not self._mender.is_alive():
            self._mender = threading.Thread(target=self._mend, name="haori-library-mender", daemon=True)
            self._mender.start()

    def _mend(self) -> None:
        with suppress(HaoriError):
            self._library.names()


def _full_names(names: Names, registered: Mapping[str, Registered]) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for row in names.rows:
        found[row.adapter] = (*found.get(row.adapter, ()), f"{row.name}@{row.version}")
    for name, entry in registered.items():
        found[entry.adapter] = (*found.get(entry.adapter, ()), name)
    return found


def _stat(path: Path) -> tuple[int, int, int] | None:
    """Return number, size and modification time of a file; None if it is absent or empty, as an idle WAL file is."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat.st_size else None
