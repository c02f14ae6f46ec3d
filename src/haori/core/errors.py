"""Every error a person can cause or meet, as one tree.

    HaoriError                  exit code 1
    ├── InputError              exit code 2: what was given cannot be used
    │   ├── RecipeError         a key or value of a recipe
    │   ├── DataError           a dataset, with file, row and field where they are known
    │   ├── BaseError           a base model that cannot be found, read or used this way
    │   ├── FileFormatError     a file that is truncated, hostile or of another kind than it claims
    │   ├── MismatchError       an adapter and a base (or dataset) that do not belong together
    │   └── LibraryError        a name or adapter the library does not hold, or refuses
    │       └── LibraryDamagedError   a file of the library itself
    ├── StorageError            exit code 2: disk full, folder not writable
    ├── DownloadError           exit code 2: offline, not found, or not the expected content
    ├── MissingExtraError       exit code 2: an optional dependency is not installed
    ├── TrainingError           exit code 1: training ran and could not go on
    ├── OverloadedError         exit code 1: more requests wait than are allowed to; try again later
    ├── UnavailableError        exit code 1: another server that is needed cannot be reached, or has ended
    └── VerificationError       exit code 1: the saved adapter is not what was trained

A message is one sentence or two: what was given, what is allowed, what to do next.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "BaseError",
    "DataError",
    "DownloadError",
    "FileFormatError",
    "HaoriError",
    "InputError",
    "LibraryDamagedError",
    "LibraryError",
    "MismatchError",
    "MissingExtraError",
    "OverloadedError",
    "RecipeError",
    "StorageError",
    "TrainingError",
    "UnavailableError",
    "VerificationError",
    "nearest",
]


class HaoriError(Exception):
    """Root of the tree; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(HaoriError):
    """Something the user gave cannot be used."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe has an unknown key, a value of the wrong type, or a value out of range."""


class DataError(InputError):
    """A dataset cannot be read, understood or trained on."""


class BaseError(InputError):
    """A base model cannot be found, read, or used in the way that was asked."""


class FileFormatError(InputError):
    """A file is truncated, malformed, unsafe, or not of the kind its name says."""


class MismatchError(InputError):
    """An adapter is asked to work with something it was not made for."""


class LibraryError(InputError):
    """The library does not hold, or will not take, what was named."""


class LibraryDamagedError(LibraryError):
    """A file that the library itself keeps is damaged, whatever was named."""


class StorageError(HaoriError):
    """Writing failed: no space, no permission, or not a folder."""

    exit_code = 2


class DownloadError(HaoriError):
    """Something could not be fetched: no network, not found, or other content than expected."""

    exit_code = 2


class MissingExtraError(HaoriError):
    """An optional dependency is needed; the message holds the exact install line."""

    exit_code = 2


class TrainingError(HaoriError):
    """Training started and could not go on (a loss that is not finite, say)."""


class OverloadedError(HaoriError):
    """A server has as much work waiting as it takes; `retry_after_s` says when to ask again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(HaoriError):
    """Another server that the work is given to cannot be reached, or ended while it worked."""


class VerificationError(HaoriError):
    """A saved adapter failed its proof."""


def nearest(given: str, allowed: Iterable[str], *, limit: int = 3) -> str:
    """Return `did you mean ...?` with the closest allowed names, or the empty string if none is close."""
    close = difflib.get_close_matches(given, list(allowed), n=limit, cutoff=0.5)
    return f"did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
