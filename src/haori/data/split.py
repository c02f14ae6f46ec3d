"""Which rows are held out for validation: decided by content alone.

Each row has a point in [0, 1) made from a hash of its opening (what is said before the first answer, without case
and punctuation), and is held out when the point is below the share. So the same question is never on both sides,
and adding, removing or reordering rows moves no other row.

Tiny data need an exception, since nothing may fall below the share: then the rows with the smallest point are held
out. When such data grow, the rows held out so far may go back to training, and new ones take their place; no row
moves from training to validation, which is the direction that would flatter later scores. In the same way, when
everything falls below the share, the rows with the largest point are trained on; these may be held out once the
data have grown (of n openings and share s, this happens once in 1/s^n datasets).

When all rows open alike (one instruction, many answers), the point is made from the whole row.
"""

import hashlib
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError
from haori.data.conversation import Conversation, normalise, words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["choose_validation", "point", "points"]

_SALT = b"haori split 1\n"


def points(row: Conversation) -> tuple[float, float]:
    """Return the row's point by its opening, and the one by its whole content."""
    return point(row.opening), point(row.body)


def point(text: str) -> float:
    """Return the point of a text, whatever its case and punctuation."""
    key = " ".join(words(text)) or normalise(text)
    digest = hashlib.sha256(_SALT + key.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def choose_validation(
    by_opening: "NDArray[np.float64]", by_body: "NDArray[np.float64]", share: float
) -> tuple["NDArray[Any]", str | None]:
    """Return a mask of the rows held out, and a note when an exception of the module's text was used.

    Args:
        by_opening: Each row's point by its opening.
        by_body: Each row's point by its whole content.
        share: Share of rows to hold out; 0 holds out none.

    Raises:
        DataError: All rows are the same text, so that none can be held out.
    """
    import numpy as np

    if share == 0 or not len(by_opening):
        return np.zeros(len(by_opening), dtype=bool), None
    note = None
    chosen = by_opening
    if np.all(chosen == chosen[0]):
        chosen = by_body
        note = "All rows open with the same words, so the validation split was chosen by whole rows."
    held = chosen < share
    if held.any() and not held.all():
        return held, note
    if np.all(chosen == chosen[0]):
        raise DataError(
            f"All {len(chosen)} rows are the same but for case and punctuation, so none can be held out; "
            "add other rows, or give --set data.validation_share=0."
        )
    if held.all():
        return (
            chosen != chosen.max(),
            "All rows fell into the validation split; those with the largest hash are trained on.",
        )
    return chosen == chosen.min(), (
        f"No row fell into the validation split of {share:.0%}; the row with the smallest hash is held out "
        "(it may go back to training when the data grow)."
    )
