"""Rows of the validation split that training has seen, word for word or nearly.

Exact: the same text but for case, width and spacing. Near: Jaccard similarity of the sets of word 3-grams of at
least 0.8 (Broder 1997), computed exactly through an inverted index of the validation rows, not estimated; 3-grams that
more than a tenth of those rows share (an instruction repeated in each row) say nothing and are left out. The index
holds the first 5,000 validation rows, so memory does not grow with the training split.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice
from zlib import crc32

from haori.data.conversation import Conversation, normalise, words
from haori.data.report import Leaks

__all__ = ["COMPARED", "THRESHOLD", "find_leaks"]

THRESHOLD = 0.8
COMPARED = 5000
_COMMON_SHARE = 0.1
_COMMON_LEAST = 10
_EXAMPLES = 20
_SPACE = re.compile(r"\s+")


def find_leaks(validation: Iterable[Conversation], train: Iterable[Conversation]) -> Leaks:
    """Compare two splits; each is gone through once.

    Args:
        validation: Rows held out; a hash of each is kept.
        train: Rows trained on; none is kept.
    """
    held: dict[str, list[str]] = defaultdict(list)
    index = _Index()
    for row in validation:
        held[normalise(row.body)].append(row.origin)
        if len(index.rows) < COMPARED:
            index.add(row)
    index.finish()
    exact: dict[str, str] = {}
    near: dict[str, tuple[float, str]] = {}
    for row in train if held else ():
        for origin in held.get(normalise(row.body), ()):
            exact.setdefault(origin, f"{origin} is also in training as {row.origin}: {_excerpt(row)}")
        for similarity, origin in index.similar(row):
            if similarity > near.get(origin, (0.0, ""))[0]:
                near[origin] = (
                    similarity,
                    f"{origin} is nearly the same as {row.origin} ({similarity:.2f}): {_excerpt(row)}",
                )
    near = {origin: found for origin, found in near.items() if origin not in exact}
    shown = [*exact.values(), *(text for _, text in near.values())]
    return Leaks(
        exact=len(exact),
        near=len(near),
        compared=len(index.rows),
        threshold=THRESHOLD,
        examples=tuple(islice(shown, _EXAMPLES)),
    )


class _Index:
    """Word 3-grams of the validation rows, and the rows that hold each."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self._sizes: list[int] = []
        self._postings: dict[int, list[int]] = defaultdict(list)
        self._common: frozenset[int] = frozenset()

    def add(self, row: Conversation) -> None:
        grams = _grams(row)
        for gram in grams:
            self._postings[gram].append(len(self.rows))
        self.rows.append(row.origin)
        self._sizes.append(len(grams))

    def finish(self) -> None:
        """Take out what is too common to tell rows apart."""
        limit = max(_COMMON_LEAST, _COMMON_SHARE * len(self.rows))
        self._common = frozenset(gram for gram, rows in self._postings.items() if len(rows) > limit)
        for gram in self._common:
            for number in self._postings.pop(gram):
                self._sizes[number] -= 1

    def similar(self, row: Conversation) -> list[tuple[float, str]]:
        """Return (similarity, origin) of the rows at or above the threshold."""
        grams = _grams(row) - self._common
        shared = Counter(number for gram in grams for number in self._postings.get(gram, ()))
        found = ((n / (len(grams) + self._sizes[number] - n), number) for number, n in shared.items())
        return [(similarity, self.rows[number]) for similarity, number in found if similarity >= THRESHOLD]


def _grams(row: Conversation) -> set[int]:
    found = words(row.body)
    return {crc32(" ".join(found[i : i + 3]).encode()) for i in range(max(1, len(found) - 2))} if found else set()


def _excerpt(row: Conversation, limit: int = 80) -> str:
    text = _SPACE.sub(" ", row.body).strip()
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
