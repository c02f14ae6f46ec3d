"""What can be named in prompts to one base: adapters of the library and of mounted trees, as clients list them.

Nothing is opened: what is shown was read when the library took the adapter in, or when its tree was scanned. Paths are
relative to the library or to the folder above the tree; where these lie is not told.
"""

import json
import mimetypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from haori.core.errors import LibraryError
from haori.images.adapters import PictureAdapters
from haori.library.mounts.described import UNKNOWN
from haori.library.mounts.mounts import Scan
from haori.library.searching.entries import Entry
from haori.library.searching.query import folded

__all__ = ["Catalogue", "Listing", "Preview"]

_LIBRARY = "library"
_MOST_PREVIEW_BYTES = 16 << 20


class Listing(NamedTuple):
    """An adapter as a client lists it.

    Attributes:
        name: What a tag names it by.
        alias: Another name for it; the same where it has none.
        path: Relative, `library/smile@2` or `Lora/styles/ink.safetensors`.
        full_name: The one name that means it alone, `smile@2` or `Lora/styles/ink`.
        category: The folder of a mounted tree that it lies in, `styles`; empty at the top and in the library.
        created: When it was made or changed, as ISO 8601; empty where that is not known.
        strength: Preferred by its user; None where nothing is said.
        activation: Words to put into a prompt beside the tag.
        negative: The same for the negative prompt.
        description: What it is.
        notes: Of its user.
        has_preview: Whether there is a picture of it.
        facts: What is known of it beside: base, method, rank, licence.
    """

    name: str
    alias: str
    path: str
    full_name: str
    category: str
    created: str
    strength: float | None
    activation: str
    negative: str
    description: str
    notes: str
    has_preview: bool
    facts: Mapping[str, Any]


class Preview(NamedTuple):
    """A picture of an adapter, as it lies beside it."""

    content: bytes
    media_type: str


class Catalogue:
    """The adapters that fit a base, as far as their cards and headers tell.

    Args:
        adapters: Where they are.
        family: Kind of base, such as `sd15`; what is known to be for another kind is not listed.
    """

    def __init__(self, adapters: PictureAdapters, family: str) -> None:
        self._adapters = adapters
        self._library = adapters.library
        self._family = family

    def listings(self) -> tuple[Listing, ...]:
        """Return every adapter that can be named, by path, as of the last scan of the mounted trees."""
        base = self._adapters.base.id
        fitting = [
            entry for entry in self._adapters.entries()
            if entry.problem is None and (entry.family in (None, UNKNOWN, self._family) or entry.base_id == base)
        ]  # fmt: skip
        stored: dict[str, dict[int, Entry]] = {}
        for entry in fitting:
            if entry.mount is None:
                stored.setdefault(entry.name, {})[entry.version] = entry
        mounted = [entry for entry in fitting if entry.mount is not None]
        stems: dict[str, int] = {folded(name): 1 for name in stored}
        for entry in mounted:
            stem = folded(_stem(entry))
            stems[stem] = stems.get(stem, 0) + 1
        beside = self._library.mounts.beside() if mounted else {}
        listed = [
            _mounted(entry, beside.get(entry.adapter), alone=stems[folded(_stem(entry))] == 1) for entry in mounted
        ]
        return tuple(sorted((*self._active(stored), *listed), key=lambda listing: listing.path.casefold()))

    def refresh(self) -> tuple[Scan, ...]:
        """Look for new, changed and deleted files in the mounted trees."""
        return self._adapters.refresh()

    def names_of(self, name: str) -> tuple[str, ...]:
        """Return every name in full of the adapter that a name means.

        Raises:
            LibraryError: It means none, or several.
        """
        stored = self._library.get(name)
        if stored.mounted is None:
            return stored.card.names
        return stored.mounted.name, stored.mounted.path.stem

    def preview(self, name: str) -> Preview:
        """Return the picture that lies beside a mounted file.

        Raises:
            LibraryError: There is no such file, or none beside it, or it is too large.
        """
        mounted = self._library.get(name).mounted
        if mounted is None or mounted.sidecars.preview is None:
            raise LibraryError(f"The adapter {name[:120]!r} has no preview.")
        folder = mounted.path.parent
        picture = folder / Path(mounted.sidecars.preview).name
        try:
            # A scan lets no link out of the tree; this one may have been put there since.
            inside = picture.resolve().parent == folder.resolve()
            size = picture.stat().st_size
            content = picture.read_bytes() if inside and size <= _MOST_PREVIEW_BYTES else b""
        except OSError:
            content = b""
        if not content:
            raise LibraryError(
                f"The preview of {name[:120]!r} is gone, or has more than {_MOST_PREVIEW_BYTES:,} bytes."
            )
        return Preview(content, mimetypes.guess_type(picture.name)[0] or "application/octet-stream")

    def _active(self, stored: Mapping[str, Mapping[int, Entry]]) -> list[Listing]:
        """Return, of each stored name, the version that it means without one, or the newest that fits."""
        names = self._library.names() if stored else None
        found = []
        for name, versions in stored.items():
            promoted = names.promoted(name) if names is not None else None
            chosen = max(versions) if promoted is None else promoted[0].version
            found.append(_stored(versions.get(chosen, versions[max(versions)])))
        return found


def _stem(entry: Entry) -> str:
    return Path(entry.adapter).stem


def _stored(entry: Entry) -> Listing:
    return Listing(
        name=entry.name, alias=entry.full_name, path=f"{_LIBRARY}/{entry.full_name}", full_name=entry.full_name,
        category="", created=entry.created, strength=None, activation=_joined(entry.triggers), negative="",
        description="", notes="", has_preview=False, facts=_facts(entry),
    )  # fmt: skip


def _mounted(entry: Entry, beside: tuple[str, str] | None, *, alone: bool) -> Listing:
    alias, text = beside or ("", "")
    said: dict[str, Any] = json.loads(text) if text else {}
    name = _stem(entry) if alone else entry.name
    return Listing(
        name=name, alias=alias or name, path=entry.adapter, full_name=entry.name,
        category="/".join(entry.adapter.split("/")[1:-1]), created=entry.created, strength=said.get("strength"),
        activation=", ".join(said.get("trigger_words", ())), negative=said.get("negative_prompt", ""),
        description=said.get("description", ""), notes=said.get("notes", ""),
        has_preview=said.get("preview") is not None, facts=_facts(entry),
    )  # fmt: skip


def _facts(entry: Entry) -> dict[str, Any]:
    found = {
        "base": entry.base, "family": entry.family, "method": entry.method, "format": entry.format, "rank": entry.rank,
        "size_bytes": entry.size_bytes, "licence": entry.licence, "trigger_words": _joined(entry.triggers),
        "proved": entry.proved,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value not in (None, "", UNKNOWN)}


def _joined(lines: str) -> str:
    return ", ".join(filter(None, lines.split("\n")))
