"""Which folders are mounted, by name: `mounts.json` in the library's folder."""

import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from haori.core.errors import InputError, LibraryDamagedError, LibraryError, nearest
from haori.core.lock import file_lock
from haori.core.records import Record, now
from haori.core.storage import write_text
from haori.core.user_path import user_path

__all__ = ["Mount", "MountRecord"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LIMIT_BYTES = 4 << 20


class Mount(Record):
    """One mounted folder."""

    path: Path
    added: str


class _Document(Record):
    schema_version: Literal[1] = 1
    mounts: dict[str, Mount]


class MountRecord:
    """The record in the library's folder `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / "mounts.json"

    def read(self) -> dict[str, Mount]:
        """Return the mounts by name.

        Raises:
            LibraryDamagedError: The file is damaged.
        """
        try:
            with self._path.open("rb") as file:
                return _Document.model_validate_json(file.read(_LIMIT_BYTES)).mounts
        except FileNotFoundError:
            return {}
        except ValidationError:
            raise LibraryDamagedError(
                f"The list of mounts {str(self._path)!r} is damaged; delete it and mount the folders again."
            ) from None

    def add(self, folder: Path, name: str | None) -> str:
        """Add a folder and return its name; one that is there already keeps its name.

        Args:
            folder: The folder.
            name: What its adapters' names begin with; by default the folder's own name.

        Raises:
            InputError: It is no folder.
            LibraryError: The name is not allowed or taken, or the folder lies in another mount or in the library.
        """
        path = Path(os.path.realpath(user_path(folder)))
        if not path.is_dir():
            raise InputError(f"{str(folder)!r} is not a folder; mount the folder that holds the LoRA files.")
        chosen = path.name if name is None else name
        if not _NAME.fullmatch(chosen):
            raise LibraryError(
                f"A mount cannot be called {chosen[:80]!r}: use letters, digits, '.', '_' and '-' (at most 64, a "
                "letter or digit first); give another with --name."
            )
        with self._lock():
            mounts = self.read()
            if (held := mounts.get(chosen)) is not None and held.path != path:
                raise LibraryError(
                    f"The mount {chosen!r} is {str(held.path)!r}; give {str(folder)!r} another name with --name."
                )
            self._check_apart(path, {key: mount for key, mount in mounts.items() if key != chosen})
            self._write({**mounts, chosen: held or Mount(path=path, added=now())})
        return chosen

    def remove(self, name: str) -> Mount:
        """Take a mount out of the record; its folder stays as it is.

        Raises:
            LibraryError: There is none of that name.
        """
        with self._lock():
            mounts = self.read()
            if name not in mounts:
                hint = nearest(name, mounts) or (
                    f"there are {', '.join(sorted(mounts))}." if mounts else "nothing is mounted."
                )
                raise LibraryError(f"There is no mount {name[:80]!r}; {hint}")
            self._write({key: mount for key, mount in mounts.items() if key != name})
        return mounts[name]

    def _check_apart(self, path: Path, others: dict[str, Mount]) -> None:
        inside = {"the library itself": Path(os.path.realpath(self._root))}
        inside |= {f"the mount {name!r}": mount.path for name, mount in others.items()}
        for what, other in inside.items():
            if path.is_relative_to(other) or other.is_relative_to(path):
                raise LibraryError(
                    f"{str(path)!r} and {what} ({str(other)!r}) lie in each other, so files would be listed twice."
                )

    def _write(self, mounts: dict[str, Mount]) -> None:
        write_text(self._path, _Document(mounts=mounts).model_dump_json(indent=2) + "\n")

    def _lock(self) -> AbstractContextManager[None]:
        return file_lock(self._root / ".lock", holds="library")
