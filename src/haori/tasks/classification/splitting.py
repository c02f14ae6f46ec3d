"""Which rows are held out for validation: by content, as for text, and so that no label is without rows on either side.

A row is held out when the point of its text (see `haori.data.split`) is below the share, whatever its label, so that
the same text is never on both sides. A label of at least five rows of which none would be held out gives the rows with
its smallest point, and one of which all would be held out gets those with its largest point back.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haori.data.split import choose_validation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["choose_stratified"]

_LEAST = 5


def choose_stratified(
    points: "NDArray[np.float64]", labels: Sequence[Sequence[str]], share: float
) -> tuple["NDArray[Any]", list[str]]:
    """Return a mask of the rows held out, and notes on what was moved for the sake of a label.

    Args:
        points: Each row's point by its text.
        labels: Each row's labels.
        share: Share of rows to hold out; 0 holds out none.

    Raises:
        DataError: All rows are the same text, so that none can be held out.
    """
    import numpy as np

    held, note = choose_validation(points, points, share)
    notes = [note] if note else []
    if share == 0:
        return held, notes
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, names in enumerate(labels):
        for name in set(names):
            rows_of[name].append(row)
    moved_out, moved_back = [], []
    for name, rows in sorted(rows_of.items(), key=lambda item: (len(item[1]), item[0])):
        those = points[rows]
        if held[rows].all() and len(held) > len(rows):
            held[points == those.max()] = False
            moved_back.append(name)
        elif not held[rows].any() and len(np.unique(those)) >= _LEAST:
            held[points == those.min()] = True
            moved_out.append(name)
    for names, then in ((moved_out, "one is held out"), (moved_back, "one is trained on")):
        if names:
            shown = ", ".join(map(repr, names[:10])) + (" and others" if len(names) > 10 else "")
            notes.append(f"So that validation and training both have rows of it, {then} of {shown}.")
    return held, notes
