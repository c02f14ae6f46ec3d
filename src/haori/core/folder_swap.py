"""Puts a complete folder in the place of another, so that a process killed at any instant leaves one of the two whole.

Where the system can exchange two names in one call (Linux, macOS), there is no instant without a folder in that place.
Elsewhere, and on file systems that refuse, the old folder is first renamed to `.<name>.<random>.old`, and `recover`
puts it back if the new one never took its place. Folders are deleted under another name, so what it puts back is whole.
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["delete_folder", "put_in_place", "recover", "recover_all"]

_ATTEMPTS = 100
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_RENAME_SWAP = 2  # of macOS
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
_ASIDE = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.old")


def put_in_place(new: Path, final: Path) -> None:
    """Rename the folder `new`, which stands beside `final`, to `final`; a folder that was there is deleted.

    Raises:
        OSError: It cannot be renamed; what was at `final` is there still, or again.
    """
    recover(final)
    for _ in range(_ATTEMPTS):
        if final.is_file():
            break
        if os.path.lexists(final) and _exchange(new, final):
            _sync_folder(final.parent)
            _delete_leftover(new)
            return
        old = _set_aside(final)
        try:
            new.rename(final)
        except OSError as error:
            if old is not None:
                _put_back_or_delete(old, final)
            if error.errno in _TAKEN:
                continue  # another process was quicker; its folder is replaced in turn
            raise
        _sync_folder(final.parent)
        if old is not None:
            _delete_leftover(old)
        return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))


def recover(final: Path) -> None:
    """Undo, or finish, what a killed process left of a replacement of `final`."""
    if final.parent.is_dir():
        _recover(final, [path for path in final.parent.iterdir() if _place_of(path) == final])


def recover_all(folder: Path) -> None:
    """Do so for everything directly in `folder`."""
    found = [path for path in folder.iterdir() if _place_of(path) is not None] if folder.is_dir() else []
    for final in {_place_of(path) for path in found} - {None}:
        assert final is not None
        _recover(final, [path for path in found if _place_of(path) == final])


def delete_folder(folder: Path) -> None:
    """Delete a folder: out of sight in one rename, then file by file, so that half of it is never seen under its name.

    Raises:
        OSError: It cannot be renamed or deleted.
    """
    grave = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".removed."))
    try:
        folder.rename(grave / "folder")
    finally:
        shutil.rmtree(grave)


def _place_of(path: Path) -> Path | None:
    found = _ASIDE.fullmatch(path.name)
    return path.with_name(found[1]) if found else None


def _recover(final: Path, aside: Sequence[Path]) -> None:
    for old in aside:
        _put_back_or_delete(old, final)


def _put_back_or_delete(old: Path, final: Path) -> None:
    """Rename `old` to `final`, or delete it if there is a folder there; again while other processes do as much."""
    for _ in range(_ATTEMPTS):
        if not os.path.lexists(old):  # here, or by another process
            return
        if not os.path.lexists(final):
            with suppress(OSError):
                old.rename(final)
        elif not _delete_leftover(old):
            return


def _delete_leftover(folder: Path) -> bool:
    try:
        delete_folder(folder)
    except OSError:  # its name is not looked at, and `sweep` tries again
        return False
    return True


def _set_aside(final: Path) -> Path | None:
    """Rename `final` to a name that `recover` knows; None if there is nothing."""
    aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.old")
    try:
        final.rename(aside)
    except FileNotFoundError:
        return None
    return aside


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places in one system call; False where that cannot be done."""
    call = _exchange_call()
    return call is not None and call(os.fsencode(first), os.fsencode(second)) == 0


@lru_cache(maxsize=1)
def _exchange_call() -> Any:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            swap = library.renamex_np
            return lambda first, second: swap(first, second, ctypes.c_uint(_RENAME_SWAP))
        rename = library.renameat2
        flags = ctypes.c_uint(_RENAME_EXCHANGE)
        return lambda first, second: rename(_AT_FDCWD, first, _AT_FDCWD, second, flags)
    except (OSError, AttributeError, TypeError):
        return None


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
