"""What a spec means: a name, a name with version, or digits of an id, looked up among the rows of the index.

A bare name means the version that was promoted last, and its newest version where none was.
"""

import heapq
import re
from collections.abc import Sequence
from operator import eq

from haori.core.errors import LibraryError, nearest
from haori.library.promotion import History, Promotion, promoted_row
from haori.library.searching.index import IndexRow

__all__ = ["Names", "id_digits", "likely"]

_MOST_COMPARED = 32
_ID_PREFIX = re.compile(r"(sha256:)?[0-9a-f]{6,64}")


def id_digits(spec: str) -> str | None:
    """Return the digits of an id that a spec may be, or None."""
    return spec.removeprefix("sha256:") if _ID_PREFIX.fullmatch(spec) else None


class Names:
    """Every name of every adapter at one moment.

    Args:
        rows: The rows of the index, by name and version.
        history: What was promoted, by name.
    """

    def __init__(self, rows: Sequence[IndexRow], history: History) -> None:
        self.rows = rows
        self.history = history
        self._versions: dict[str, list[IndexRow]] = {}
        for row in rows:
            self._versions.setdefault(row.name, []).append(row)

    @property
    def bare(self) -> tuple[str, ...]:
        """Return the names without version."""
        return tuple(self._versions)

    def versions(self, name: str) -> Sequence[IndexRow]:
        """Return the rows of a name without version, the oldest first."""
        return self._versions.get(name, ())

    def promoted(self, name: str) -> tuple[IndexRow, Promotion] | None:
        """Return the promoted version of a name with its promotion, if there is one."""
        entries = self.history.get(name)
        return promoted_row(self.versions(name), entries) if entries else None

    def find(self, spec: str) -> IndexRow:
        """Choose the row that a spec means.

        Raises:
            LibraryError: There is none, or the id digits fit several; near names are given.
        """
        name, _, version = spec.partition("@")
        named = self.versions(name)
        if named and not version:
            promoted = self.promoted(name)
            return named[-1] if promoted is None else promoted[0]
        for row in named:
            if version == str(row.version):
                return row
        if named:
            held = ", ".join(str(row.version) for row in named)
            raise LibraryError(f"{name!r} has no version {version!r}; it has {held}.")
        if (digits := id_digits(spec)) is not None:
            fitting = {row.adapter: row for row in self.rows if row.adapter.removeprefix("sha256:").startswith(digits)}
            if len(fitting) > 1:
                raise LibraryError(f"The digits {digits!r} fit {len(fitting)} adapters; give more of them.")
            if fitting:
                return next(iter(fitting.values()))
        if not self.rows:
            raise LibraryError(
                f"The library has no adapter {spec!r}: it is empty. Train one, or add one that you have."
            )
        hint = nearest(name, likely(name, self.bare)) or "`haori library list` shows what it holds."
        raise LibraryError(f"The library has no adapter {spec!r}; {hint}")


def likely(name: str, others: Sequence[str]) -> Sequence[str]:
    """Return the names with most characters in the same places: comparing it with thousands in full takes long."""
    if len(others) <= _MOST_COMPARED:
        return others
    return heapq.nlargest(_MOST_COMPARED, others, lambda other: sum(map(eq, name, other)))
