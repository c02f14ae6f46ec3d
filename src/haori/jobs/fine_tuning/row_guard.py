"""Bounds what reading rows can cost, while they arrive: the length of one row, and how many there are.

Whether a row is right is for the data layer to say; this only keeps what it reads small.
"""

from haori.core.errors import DataError

__all__ = ["MOST_ROWS", "MOST_ROW_BYTES", "RowGuard"]

MOST_ROW_BYTES = 4 << 20
MOST_ROWS = 1_000_000


class RowGuard:
    """Watches the bytes of a file of one JSON object a line.

    Attributes:
        problem: What is wrong with the file; None so far.
    """

    def __init__(self, filename: str, *, row_bytes: int = MOST_ROW_BYTES, rows: int = MOST_ROWS) -> None:
        self.problem: DataError | None = None
        self._filename = filename
        self._row_bytes, self._rows = row_bytes, rows
        self._breaks = 0
        self._held = 0  # bytes of the line that has not ended

    def watch(self, data: bytes) -> None:
        """Look at the next bytes; once there is a problem nothing more is looked at."""
        if self.problem is not None:
            return
        for index, piece in enumerate(data.split(b"\n")):
            if index:
                self._breaks += 1
                self._held = 0
            self._held += len(piece)
            if self._held > self._row_bytes:
                self.problem = DataError(
                    f"{self._filename}:{self._breaks + 1}: this row is longer than {self._row_bytes >> 20} MB; a "
                    "training file has one JSON object a line."
                )
                return
        if self._breaks > self._rows:
            self.problem = DataError(
                f"{self._filename} has more than {self._rows:,} rows; train on fewer, or on several files in turn."
            )
