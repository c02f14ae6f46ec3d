"""Finding adapters by what is known of them: in names, trigger words, tags, bases, licences and measured figures."""

from typing import NamedTuple

from haori.core.errors import InputError, nearest
from haori.library.mounts.mounts import Mounts
from haori.library.promotion import History
from haori.library.searching.entries import FIGURES, Entry, merge_found
from haori.library.searching.index import Index
from haori.library.searching.query import Query, parse_query
from haori.library.specs import Names

__all__ = ["Listed", "Search", "search"]


class Listed(NamedTuple):
    """A line of a list: what is shown, and whether the bare name means this version because it was promoted."""

    entry: Entry
    promoted: bool


class Search(NamedTuple):
    """What a search found, the best first; `close` has the words that were taken for one that occurs nowhere."""

    listed: tuple[Listed, ...]
    close: dict[str, tuple[str, ...]]


def search(index: Index, mounts: Mounts, history: History, text: str) -> Search:
    """Return the adapters that `text` describes, see `Library.search`.

    Raises:
        InputError: It has a filter or a figure that there is not.
    """
    query = parse_query(text)
    found = merge_found([index.find(query), mounts.find(query)], query)
    if not found.entries:
        _check_figures(index, query)
    promoted: dict[str, int] = {}
    for name in {entry.name for entry in found.entries} & history.keys():
        if (current := Names(index.rows_of(name), history).promoted(name)) is not None:
            promoted[name] = current[0].version
    listed = (Listed(entry, promoted.get(entry.name) == entry.version) for entry in found.entries)
    return Search(tuple(listed), found.close)


def _check_figures(index: Index, query: Query) -> None:
    """Refuse a comparison of what no adapter was measured by: that nothing was found would say too little."""
    if not query.comparisons:
        return
    known = FIGURES.keys() | index.figures()
    for figure, _, _ in query.comparisons:
        if figure not in known:
            hint = nearest(figure, known) or f"there are {', '.join(sorted(known))}."
            raise InputError(f"No adapter has the figure {figure[:60]!r}; {hint}")
