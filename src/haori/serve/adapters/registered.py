"""Adapters that an administrator gave a name while the server runs, kept in a small file so that a kill loses none.

Each name stands for the content that was there when it was given. A folder whose files changed since is refused until
it is registered again, and so is one that is no longer inside the allowed roots. The file comes back from disk, so
what it says is checked like anything from outside. Several servers of one base may share it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from haori.core.errors import FileFormatError, LibraryError, StorageError
from haori.core.lock import file_lock
from haori.core.records import Record
from haori.core.storage import make_folder, write_text
from haori.library import AdapterFiles, inspect_adapter
from haori.library.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from haori.library.head_files import HEAD_NAME

__all__ = ["Registered", "RegisteredFile", "folder_inside", "is_inside", "registered_files", "stamp_of"]

_LIMIT_BYTES = 16 << 20


class Registered(Record):
    """What one name stands for."""

    adapter: str = Field(pattern=r"^sha256:[0-9a-f]{64}$", description="Content id.")
    folder: Path
    time: str
    stamp: tuple[tuple[int, int, int], ...] | None = Field(
        description="Number, size and modification time of its files; None in the library, which never changes them."
    )


class _Document(Record):
    schema_version: Literal[1] = 1
    names: dict[str, Registered]


class RegisteredFile:
    """The file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Mapping[str, Registered]:
        """Return what every name stands for.

        Raises:
            StorageError: The file is damaged.
        """
        try:
            with self.path.open("rb") as file:
                return _Document.model_validate_json(file.read(_LIMIT_BYTES)).names
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValidationError:
            raise StorageError(
                f"{str(self.path)!r}, which holds the adapters registered at run time, is damaged; restore it, or "
                "delete it and register them again."
            ) from None

    def change(self, change: Callable[[Mapping[str, Registered]], Mapping[str, Registered]]) -> None:
        """Replace what the file holds by what `change` makes of it, with no one else writing meanwhile.

        Raises:
            StorageError: It cannot be written.
        """
        make_folder(self.path.parent)
        with file_lock(self.path.with_name(".lock"), holds="registered adapters"):
            document = _Document(names=dict(sorted(change(self.read()).items())))
            write_text(self.path, document.model_dump_json(indent=2) + "\n")


def folder_inside(given: str, roots: Sequence[Path]) -> Path:
    """Return the folder `given`, relative to a root or absolute, with every link followed.

    Raises:
        LibraryError: There is none inside a root. What is outside is not looked at.
    """
    for root in roots:
        # An absolute path stands for itself.
        if (real := _resolved(root / given, roots)) is not None and real.is_dir():
            return real
    where = "nor inside a folder to load adapters from" if roots else "and there is no other folder to load them from"
    raise LibraryError(f"The adapter {given[:200]!r} is not in the library, {where}.")


def is_inside(folder: Path, roots: Sequence[Path]) -> bool:
    """Say whether a path, with every link followed, lies inside one of the roots."""
    return _resolved(folder, roots) is not None


def _resolved(path: Path, roots: Sequence[Path]) -> Path | None:
    try:
        real = path.resolve()
        is_allowed = any(real.is_relative_to(root.resolve()) for root in roots)
        real.lstat()
    except (OSError, RuntimeError, ValueError):  # absent, too long, a loop of links, a zero byte
        return None
    return real if is_allowed else None


def registered_files(entry: Registered, roots: Sequence[Path]) -> AdapterFiles:
    """Inspect the folder of an adapter registered from a root, if it is what it was.

    Raises:
        FileFormatError: Its files changed, are gone, or are not inside a root any more.
    """
    if stamp_of(entry.folder, roots) != entry.stamp:
        raise FileFormatError(
            f"The files in {entry.folder.name!r} were changed since the adapter was registered; register it again, "
            "replacing the old one."
        )
    return inspect_adapter(entry.folder)


def stamp_of(folder: Path, roots: Sequence[Path]) -> tuple[tuple[int, int, int], ...]:
    """Return number, size and modification time of an adapter's files, which must be inside the roots too.

    Raises:
        FileFormatError: One is missing, or a link that leads outside.
    """
    stamps = []
    labels = (HEAD_NAME,) if (folder / HEAD_NAME).is_symlink() or (folder / HEAD_NAME).exists() else ()
    for name in (CONFIG_NAME, WEIGHTS_NAME, *labels):
        real = _resolved(folder / name, roots)
        if real is None:
            raise FileFormatError(f"The folder {folder.name!r} holds no {name}, so there is no adapter in it.")
        stat = real.stat()
        stamps.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(stamps)
