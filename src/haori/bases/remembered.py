"""Remembers what loading a base has shown, so that the next start need not find it out again.

One small JSON file per topic and base in the cache. It is good for exactly these files under exactly this version of
transformers; whatever is missing, unreadable or of another version counts as not known.
"""

from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from haori.bases.base import Base
from haori.core.errors import StorageError
from haori.core.hashing import hash_data, hash_file
from haori.core.records import Record
from haori.core.settings import settings
from haori.core.storage import make_folder, write_text

__all__ = ["recall", "remember"]

_VERSION = 1  # of what is remembered; raised when a record gets another meaning
_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
_R = TypeVar("_R", bound=Record)


def recall(topic: str, base: Base, kind: type[_R]) -> _R | None:
    """Return what was remembered of a base under a topic, or None."""
    try:
        return kind.model_validate_json(_place(topic, base).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remember(topic: str, base: Base, record: Record) -> None:
    """Remember a record of a base; where nothing can be written, nothing is remembered."""
    place = _place(topic, base)
    try:
        make_folder(place.parent)
        write_text(place, record.model_dump_json())
    except (OSError, StorageError):
        return


def _place(topic: str, base: Base) -> Path:
    small = sorted(path for path in base.path.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    of = base.fingerprint
    identity = [
        topic, _VERSION, _transformers(), of.architecture, of.structure, of.weights,
        [[path.name, hash_file(path)] for path in small],
    ]  # fmt: skip
    digits = hash_data(identity).removeprefix("sha256:")[:32]
    return settings().cache / "remembered" / f"{topic}-{digits}.json"


@cache
def _transformers() -> str:
    return version("transformers")
