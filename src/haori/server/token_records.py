"""The log-probabilities of a whole answer in a few arrays, whose memory goes back to the system when they are freed.

Millions of small objects would fragment the process's memory, and take twice as much of it.
"""

from array import array
from collections.abc import Iterable, Iterator

from haori.serve.request import TokenLogprob

__all__ = ["TokenRecords"]


class TokenRecords:
    """Log-probabilities of consecutive tokens."""

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
        """Append log-probabilities."""
        for found in logprobs:
            top = found.top
            self._ids.append(found.token)
            self._ids.extend(token for token, _ in top)
            self._values.append(found.logprob)
            self._values.extend(value for _, value in top)
            self._ends.append(len(self._ids))
