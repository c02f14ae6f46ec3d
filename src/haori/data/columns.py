"""Which columns a file has: all its rows decide, not the first.

Rows of a file need not hold the same columns, and a column that is null or blank in every row is as good as absent.
So a file is read once before its rows are converted, and nothing of it is kept but names and counts.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from haori.data.readers import RawRow
from haori.data.row_problem import problem

__all__ = ["FileColumns", "survey"]

_PREFERENCE = frozenset({"chosen", "rejected"})


@dataclass
class FileColumns:
    """The columns of one file.

    Attributes:
        rows: Rows that could be read.
        held: Rows that hold something in a column, by its name as spelt, in the order met; 0 where all are blank.
    """

    rows: int = 0
    held: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, Any]) -> None:
        """Count a row."""
        self.rows += 1
        for name, value in values.items():
            self.held[str(name)] = self.held.get(str(name), 0) + (value not in (None, "", [], {}))

    def names(self) -> list[str]:
        """Return one spelling of each column, the most frequent one; columns without a value come last.

        A few preference pairs among other rows do not make it a file of them; they are refused row by row.
        """
        best: dict[str, str] = {}
        for name in self.held:
            key = name.strip().lower()
            if key and self.held[name] > self.held.get(best.get(key, ""), -1):
                best[key] = name
        minor = {name for key, name in best.items() if key in _PREFERENCE and 2 * self.held[name] < self.rows}
        found = [name for name in best.values() if name not in minor]
        return sorted(found, key=lambda name: self.held[name] == 0)

    def filled(self) -> list[str]:
        """Return `names` without the columns that no row holds."""
        return [name for name in self.names() if self.held[name]]

    def unused(self, used: Iterable[str]) -> Counter[str]:
        """Return the other columns that hold something, with the number of rows that do."""
        known = {name.strip().lower() for name in used}
        return Counter({name: count for name, count in self.held.items()
                        if count and name.strip() and name.strip().lower() not in known})  # fmt: skip

    def unused_exactly(self, used: Iterable[str]) -> Counter[str]:
        """Return `unused` where the used columns were named by the user, as spelt."""
        known = frozenset(used)
        return Counter(
            {name: count for name, count in self.held.items() if count and name.strip() and name not in known}
        )

    @property
    def varied(self) -> bool:
        """Say whether a column is spelt in more than one way."""
        return len(self.held) > len({name.strip().lower() for name in self.held})

    def respelt(self, row: RawRow, used: Iterable[str]) -> RawRow:
        """Return the row with the used columns spelt as the file mostly spells them.

        Raises:
            DataError: The row holds one column in two spellings.
        """
        values = row.values
        for name in used:
            others = [other for other in values
                      if other != name and str(other).strip().lower() == name.strip().lower()]  # fmt: skip
            for other in others:
                if values.get(name) not in (None, "") and values[other] not in (None, ""):
                    raise problem(row, name, f"the column is there twice, also as {other!r}; keep one")
                if values.get(name) in (None, ""):
                    values = {**values, name: values[other]}
        return row if values is row.values else replace(row, values=values)


def survey(rows: Iterable[RawRow]) -> dict[str, FileColumns]:
    """Return the columns of each file among `rows`."""
    found: dict[str, FileColumns] = {}
    for row in rows:
        if row.problem is None:
            found.setdefault(row.file, FileColumns()).add(row.values)
    return found
