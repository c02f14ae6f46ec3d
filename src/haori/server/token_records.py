"""The log-probabilities of a whole answer, in a few large pieces of memory: those go back to the system when freed.

Millions of small objects would leave holes that stay with the process, and take twice the room.
"""

from array import array
from collections.abc import Iterable, Iterator

from haori.serve.request import TokenLogprob

__all__ = ["TokenRecords"]


class TokenRecords:
    """Log-probabilities of tokens one after the other."""

    def __init__(self) -> None:
        self._ids = array("i")  # each token, followed by the likeliest ones at its position
        self._values = array("d")
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[TokenLogprob]:
        start = 0
        for end in self._ends:
            [token, *others], [value, *values] = self._ids[start:end], self._values[start:end]
            yield TokenLogprob(token, value, list(zip(others, values, strict=True)))
            start = end

    def extend(self, logprobs: Iterable[TokenLogprob]) -> None:
        """Take in what has come."""
        for found in logprobs:
            top = found.top
            self._ids.append(found.token)
            self._ids.extend(token for token, _ in top)
            self._values.append(found.logprob)
            self._values.extend(value for _, value in top)
            self._ends.append(len(self._ids))
