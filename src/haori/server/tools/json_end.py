"""Finds where a JSON object or list ends, letter by letter, without reading what is in it."""

__all__ = ["JsonEnd"]

_PAIRS = {"}": "{", "]": "["}
_OUTSIDE = frozenset(' \t\r\n:,+-.0123456789abcdefghijklmnopqrstuvwxyzE"')


class JsonEnd:
    """Where a JSON value stands.

    Attributes:
        complete: Whether the last bracket is closed.
        broken: Whether this cannot become JSON.
    """

    def __init__(self) -> None:
        self.complete = False
        self.broken = False
        self._open: list[str] = []
        self._in_string = False
        self._escaped = False

    def push(self, letter: str) -> None:
        """Go on by a letter; the first one is the opening bracket."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif letter == "\\":
                self._escaped = True
            elif letter == '"':
                self._in_string = False
        elif letter in "{[":
            self._open.append(letter)
        elif letter in _PAIRS:
            self.broken = not self._open or self._open.pop() != _PAIRS[letter]
            self.complete = not self._open and not self.broken
        elif letter == '"':
            self._in_string = True
        else:
            self.broken = letter not in _OUTSIDE
