"""What a reader of answers finds in them, in the order of the text."""

from typing import NamedTuple

__all__ = ["Argued", "Begun", "CallEvent", "Said"]


class Said(NamedTuple):
    """Text that is no part of a call."""

    text: str


class Begun(NamedTuple):
    """A call, counted from 0, of the function `name`."""

    number: int
    name: str


class Argued(NamedTuple):
    """A further piece of a call's arguments, which together are a JSON object; the last one has `ends` set."""

    number: int
    text: str
    ends: bool


CallEvent = Said | Begun | Argued
