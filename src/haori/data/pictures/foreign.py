"""What the data files of other training tools have in common: folders relative to them, and keys that are not used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from haori.core.errors import DataError
from haori.core.user_path import user_path
from haori.data.pictures.listing import Listing
from haori.data.pictures.section import PictureSection
from haori.data.readers import shorten

__all__ = ["UnusedKeys", "find_beside", "joined", "section_with", "value_of"]

_Value = TypeVar("_Value", bool, int, float, str)
_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_LARGE = 10**300


class UnusedKeys:
    """Keys of a file that have no meaning here, each with the reason, said once."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def add(self, key: str, value: Any, reason: str) -> None:
        """Note a key; one that is switched off changes nothing and is passed over."""
        if value not in (None, False, 0, "", [], {}):
            self._found.setdefault(f"{key} = {shorten(value, 60)}", reason)

    def notes(self) -> list[str]:
        """Return them as a sentence."""
        if not self._found:
            return []
        return [f"Keys not used: {'; '.join(f'{key} ({reason})' for key, reason in self._found.items())}."]


def value_of(keys: Mapping[str, Any], key: str, kind: type[_Value], where: str, default: _Value) -> _Value:
    """Return the value of a key, or the default where there is none; a whole number will do for a number.

    Raises:
        DataError: It is of another kind.
    """
    value = keys.get(key)
    if value is None:
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGE:
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise DataError(f"{where}: {key} must be {_KINDS[kind]}, not {shorten(value, 60)!r}.")
    return value


def find_beside(name: str, file: Path, where: str) -> Path:
    """Return the file or folder that a file names: from its own folder, or else from the working folder.

    Raises:
        DataError: There is none.
    """
    path = user_path(name)
    for place in (file.parent / path, path):
        if name and place.exists():
            return place
    raise DataError(f"{where}: there is no {name!r}, neither beside {file.name} nor in the working folder.")


def section_with(section: PictureSection, keys: Mapping[str, Any], where: str) -> PictureSection:
    """Return the section with what a file says in place of its own.

    Raises:
        DataError: A value is out of range.
    """
    try:
        return PictureSection(**{**section.model_dump(), **keys})
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None


def joined(layout: str, listings: list[Listing], notes: list[str]) -> Listing:
    """Return the listings of a file's parts as one."""
    merged = Listing(layout, [file for listing in listings for file in listing.files], notes=list(notes))
    for listing in listings:
        merged.ignored.extend(listing.ignored)
        merged.notes.extend(note for note in listing.notes if note not in merged.notes)
        merged.problems.extend(listing.problems)
        merged.licences.extend(listing.licences)
    return merged
