"""Which rows an adapter was trained on, as hashes kept beside its weights.

A row's hash is that of what is said in it but for case, width, spacing, roles and system message, so that it is known
again in another format. Eight bytes of SHA-256 per row, sorted: a million rows take 8 MB, and ten thousand others meet
one of them by chance once in two thousand million times.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from haori.data.conversation import Conversation, normalise, said

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SEEN_NAME", "SeenRows"]

SEEN_NAME = "training_rows.npy"


class SeenRows:
    """The rows that an adapter was trained on."""

    def __init__(self, hashes: "NDArray[np.uint64]") -> None:
        self._hashes = hashes

    @classmethod
    def of(cls, rows: Iterable[Conversation]) -> Self:
        """Return the hashes of rows."""
        import numpy as np

        return cls(np.unique(np.fromiter(map(_key, rows), dtype=np.uint64)))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what was kept in an adapter's folder; None where nothing was, or it cannot be read."""
        import numpy as np

        try:
            found: Any = np.load(folder / SEEN_NAME, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return cls(found) if isinstance(found, np.ndarray) and found.dtype == np.uint64 and found.ndim == 1 else None

    def write(self, folder: Path) -> None:
        """Keep the hashes in an adapter's folder."""
        import numpy as np

        np.save(folder / SEEN_NAME, self._hashes, allow_pickle=False)

    def among(self, rows: Sequence[Conversation]) -> list[Conversation]:
        """Return those of `rows` that were trained on."""
        import numpy as np

        known = np.isin(np.fromiter(map(_key, rows), dtype=np.uint64, count=len(rows)), self._hashes)
        return [row for row, is_known in zip(rows, known, strict=True) if is_known]


def _key(row: Conversation) -> int:
    parts = [row.text] if row.text is not None else [said(m) for m in row.messages if m["role"] != "system"]
    text = "\x1f".join(normalise(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little")
