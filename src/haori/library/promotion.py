"""Which version a bare name means: the history of promotions, kept as `promoted.json` in the library's folder.

Every promotion is kept. The last one that was not withdrawn, and whose version is still there with the same content,
counts; without one the newest version does. Going back withdraws it, so that the one before counts again. The file
is replaced in one rename under the library's lock. It cannot be made again from the cards, and nothing else depends
on it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from haori.core.errors import LibraryDamagedError, LibraryError
from haori.core.records import Record, now
from haori.core.storage import write_text
from haori.library.searching.index import IndexRow

if TYPE_CHECKING:
    from haori.library.specs import Names

__all__ = ["PROMOTIONS_NAME", "History", "Promotion", "PromotionFile", "promote", "promoted_row", "roll_back"]

PROMOTIONS_NAME = "promoted.json"
_LIMIT_BYTES = 32 << 20


class Promotion(Record):
    """One version that a bare name was made to mean."""

    version: int = Field(description="Version of the name.")
    adapter: str = Field(description="Id of the content it had, since a number may be given out again.")
    time: str = Field(description="Since when; of a version that was the newest, when another was promoted instead.")
    withdrawn: str | None = Field(default=None, description="When a rollback ended it.")


History = Mapping[str, Sequence[Promotion]]
"""What was promoted, by name without version, the oldest first."""


class _Document(Record):
    schema_version: Literal[1] = 1
    names: dict[str, tuple[Promotion, ...]]


class PromotionFile:
    """The file at `path`. Whoever writes holds the library's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> History:
        """Return the history by name; empty if nothing was ever promoted.

        Raises:
            LibraryDamagedError: The file is damaged.
        """
        try:
            with self.path.open("rb") as file:
                return _Document.model_validate_json(file.read(_LIMIT_BYTES)).names
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValidationError:
            raise LibraryDamagedError(
                f"{str(self.path)!r}, which says which version of a name was promoted, is damaged; restore it, or "
                "delete it, and the newest versions count again."
            ) from None

    def write(self, history: History) -> None:
        """Replace the file."""
        document = _Document(names={name: tuple(entries) for name, entries in sorted(history.items())})
        write_text(self.path, document.model_dump_json(indent=2) + "\n")


def promoted_row(named: Sequence[IndexRow], entries: Sequence[Promotion]) -> tuple[IndexRow, Promotion] | None:
    """Return the row of a name that a promotion makes count, with the promotion.

    Args:
        named: The rows of the name.
        entries: Its history.
    """
    held = {(row.version, row.adapter): row for row in named}
    for entry in reversed(entries):
        row = held.get((entry.version, entry.adapter))
        if entry.withdrawn is None and row is not None:
            return row, entry
    return None


def promote(names: "Names", spec: str) -> History:
    """Return the history after the version `spec` of a name was promoted; as it was if that version counts already.

    What the name meant as its newest version until then is written down too, so that going back leads there.

    Raises:
        LibraryError: There is no such version, or none was given.
    """
    row = names.find(spec)
    if spec != f"{row.name}@{row.version}":
        raise LibraryError(f"{spec!r} does not say which version to promote; give one, as in {row.name}@{row.version}.")
    current = names.promoted(row.name)
    if current is not None and current[0] == row:
        return names.history
    newest = names.versions(row.name)[-1]
    before = [newest] if current is None and newest != row else []
    time = now()
    added = [Promotion(version=other.version, adapter=other.adapter, time=time) for other in (*before, row)]
    return {**names.history, row.name: [*names.history.get(row.name, ()), *added]}


def roll_back(names: "Names", name: str) -> History:
    """Return the history with the last promotion of a bare name withdrawn.

    Raises:
        LibraryError: There is no such name, nothing is promoted, or nothing was before it.
    """
    row = names.find(name)
    if name != row.name:
        raise LibraryError(f"Going back is for a name without version: {row.name!r}, not {name!r}.")
    held = ", ".join(str(version.version) for version in names.versions(name))
    choose = f"{name!r} has versions {held}; promote the one you want, as in `haori library promote {name}@{{}}`."
    current = names.promoted(name)
    if current is None:
        newest = names.versions(name)[-1].version
        raise LibraryError(f"No version of {name!r} is promoted, so the newest counts. {choose.format(newest)}")
    last = current[1]
    entries = [entry.with_fields(withdrawn=now()) if entry is last else entry for entry in names.history.get(name, ())]
    before = promoted_row(names.versions(name), entries)
    if before is None:
        raise LibraryError(f"Nothing was promoted before {name}@{last.version}. {choose.format(last.version)}")
    return {**names.history, name: entries}
