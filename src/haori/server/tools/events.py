"""What a `CallReader` finds in an answer, in the order of the text."""

from typing import NamedTuple

__all__ = ["CallArguments", "CallBegun", "CallEvent", "TextFound"]


class TextFound(NamedTuple):
    """Text that is no part of a call."""

    text: str


class CallBegun(NamedTuple):
    """A call, counted from 0, of the function `name`."""

    number: int
    name: str


class CallArguments(NamedTuple):
    """A further part of a call's arguments, which joined are a JSON object; the last one has `ends` set."""

    number: int
    text: str
    ends: bool


CallEvent = TextFound | CallBegun | CallArguments
