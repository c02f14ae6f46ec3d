"""Files and folders that are either whole or absent.

Everything is written under a temporary name beside its final place, flushed to disk and renamed, so that a
process killed at any instant leaves the old state or the new one. Operating-system errors about space and
permission become `StorageError` sentences here, once.
"""

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from haori.core.errors import StorageError
from haori.core.folder_swap import put_in_place, recover_all

__all__ = [
    "explain_os_errors",
    "make_folder",
    "make_stamped_folder",
    "staged_file",
    "staged_folder",
    "sweep",
    "write_text",
]

_NAMES_TRIED = 1000
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file of that name is in the way",
}


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn OS errors about space and permission while writing `path` into a `StorageError`."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise
        raise StorageError(f"Cannot write {str(path)!r}: {reason}.") from error
    except Exception as error:
        number = _os_error_of_rust(error)
        if number not in _REASONS:
            raise
        raise StorageError(f"Cannot write {str(path)!r}: {_REASONS[number]}.") from error


def _os_error_of_rust(error: Exception) -> int | None:
    """Return the OS error that safetensors and tokenizers, which raise types of their own, give only as text."""
    if type(error) is not Exception and not type(error).__module__.startswith("safetensors"):
        return None
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def make_folder(path: Path) -> Path:
    """Create `path` with its parents and check that it can be written to.

    Raises:
        StorageError: It cannot be created or written to.
    """
    with explain_os_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def make_stamped_folder(root: Path, name: str) -> Path:
    """Make the empty folder `<name>-<local time>` under `root`, with a number behind it where that one exists.

    Raises:
        StorageError: It cannot be made.
    """
    make_folder(root)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, _NAMES_TRIED):
        folder = root / f"{name}-{stamp}{'' if attempt == 1 else f'-{attempt}'}"
        with explain_os_errors(folder), suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise StorageError(f"No free folder {name}-{stamp} could be made in {str(root)!r}; remove old ones.")


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` (UTF-8) in one step."""
    with explain_os_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """Yield the name of a file to write beside `final`; on success it takes its place, on failure it vanishes."""
    with explain_os_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.")
        os.close(handle)
        stage = Path(name)
        try:
            yield stage
            stage.chmod(0o644)
            with stage.open("rb") as file:
                os.fsync(file.fileno())
            stage.replace(final)
        finally:
            stage.unlink(missing_ok=True)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`; on success it takes the place of `final`, on failure it vanishes.

    An existing `final` is replaced only after the new one is complete and on disk, and never by half: see
    `folder_swap`.
    """
    with explain_os_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
        try:
            yield stage
            stage.chmod(0o755)
            _sync(stage)
            put_in_place(stage, final)
        finally:
            with suppress(FileNotFoundError):
                shutil.rmtree(stage)


def sweep(folder: Path) -> None:
    """Undo what a killed process left half-done directly in `folder`; nothing else may be writing there."""
    recover_all(folder)
    for path in folder.glob(".*.*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Flush every file to disk, and the folders with their names where the system can."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or (path.is_dir() and os.name == "posix"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
