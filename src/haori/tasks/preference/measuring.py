"""Reads preferences to measure on: nothing is split, and no length is checked."""

from haori.core.errors import DataError
from haori.core.hashing import hash_parts
from haori.core.records import DataReference
from haori.data.reading import Tally
from haori.data.selection import measuring_source
from haori.tasks.preference.reading import DROPPED, OnlyJudgedError, PreferenceReader, Preferred, explain_nothing
from haori.tasks.preference.recipe import PreferenceData

__all__ = ["read_preferences"]


def read_preferences(section: PreferenceData) -> tuple[list[Preferred], DataReference, tuple[str, ...]]:
    """Return pairs, or judged answers where rows are such, with their identity and what to know of the reading.

    Raises:
        DataError: The data cannot be found or understood, or no row is left after cleaning.
    """
    source, tally = measuring_source(section), Tally()
    try:
        rows = list(PreferenceReader(section, one_by_one=False).stream(source, tally, section.max_rows))
    except OnlyJudgedError:
        tally = Tally()
        rows = list(PreferenceReader(section, one_by_one=True).stream(source, tally, section.max_rows))
    if not rows:
        raise DataError(explain_nothing(section.path, tally.counts))
    reference = DataReference(
        source=section.path,
        hash=hash_parts(row.hash for row in rows),
        format="+".join(sorted(tally.formats)),
        rows={"all": len(rows)},
        licence=section.licence,
        attribution=section.attribution,
    )
    words = {"empty": "empty", "duplicates": "exact duplicates", **DROPPED}
    dropped = [f"{tally.counts[name]:,} {word}" for name, word in words.items() if tally.counts[name]]
    notes = [f"Rows dropped: {', '.join(dropped)}."] if dropped else []
    return rows, reference, (*notes, *tally.notes(source))
