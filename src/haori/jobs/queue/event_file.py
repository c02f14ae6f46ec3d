"""The file that carries a job's events from its process to its worker: JSON lines, only ever appended to.

Where the disk is full an event waits in memory and is written, whole and in its turn, with a later one.
"""

import os
from pathlib import Path

from haori.core.events import Event, EventReader

__all__ = ["EventTail", "EventWriter"]


class EventWriter:
    """Appends events to a file.

    Args:
        path: The file, made if absent.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._pending = b""

    def __call__(self, event: Event) -> None:
        """Write an event, after those that could not be written before."""
        self._pending += event.model_dump_json().encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Write what waits; say whether nothing waits any more."""
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
        except OSError:  # no space; the work itself will meet that, or go on when there is some again
            return False
        return True


class EventTail:
    """Reads what was appended since it last looked.

    Args:
        path: The file, which may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._reader = EventReader()

    def read(self) -> list[Event]:
        """Return the events whose lines are whole; what is no event is passed over, as a torn line is."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                event = self._reader.read(line)
            except ValueError:
                continue
            if event is not None:
                found.append(event)
        return found
