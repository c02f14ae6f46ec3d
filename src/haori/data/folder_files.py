"""The files of a folder that data are read from, within a bound: a whole disk given by mistake is refused soon."""

from collections.abc import Iterator
from pathlib import Path

from haori.core.errors import DataError

__all__ = ["MAX_FILES", "entries_of", "files_of"]

MAX_FILES = 500_000
_UNSEEN = "__MACOSX"


def entries_of(folder: Path, given: str, *, recursive: bool = True) -> Iterator[Path]:
    """Yield what is in a folder, folders included, in no order.

    Raises:
        DataError: It holds more than `MAX_FILES` files and folders.
    """
    for count, path in enumerate(folder.rglob("*") if recursive else folder.iterdir(), start=1):
        if count > MAX_FILES:
            raise DataError(
                f"The folder {given!r} holds more than the {MAX_FILES:,} files that are read from one; give the folder "
                "that the data are in, or part of it."
            )
        yield path


def files_of(folder: Path, given: str, *, recursive: bool = True) -> list[Path]:
    """Return the files of a folder in sorted order, hidden ones left out.

    Raises:
        DataError: It holds more than `MAX_FILES` files and folders.
    """
    return sorted(
        path
        for path in entries_of(folder, given, recursive=recursive)
        if not any(part.startswith(".") or part == _UNSEEN for part in path.relative_to(folder).parts)
        and path.is_file()
    )
