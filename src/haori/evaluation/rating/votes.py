"""Votes on pairs, one line of JSON each, appended and flushed to disk at once.

Nothing is changed or removed: a later vote of the same rater on the same pair takes the place of the earlier one, and
`undo` takes it back.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from haori.core.base_reference import Record
from haori.core.errors import FileFormatError
from haori.core.records import now
from haori.core.storage import explain_os_errors

__all__ = ["Choice", "Vote", "read_votes", "record_vote", "standing"]

Choice = Literal["left", "right", "tie", "skip", "undo"]


class Vote(Record):
    """One line of the file.

    Attributes:
        pair: Id of the pair.
        rater: Who votes; empty where nobody was named.
        choice: The side that is better; or neither, no answer, or that the last vote on the pair does not count.
        at: When, in UTC.
    """

    pair: str
    rater: str = ""
    choice: Choice
    at: str = Field(default_factory=now)


def record_vote(path: Path, vote: Vote) -> None:
    """Append a vote; when this returns it is on disk.

    Raises:
        StorageError: It cannot be written.
    """
    with explain_os_errors(path), path.open("r+b" if path.exists() else "w+b") as file:
        # What a machine that stopped left of a line was never confirmed, and must not swallow this one.
        file.seek(file.read().rfind(b"\n") + 1)
        file.truncate()
        file.write(vote.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_votes(path: Path, pairs: Iterable[str]) -> list[Vote]:
    """Return all lines in their order; none where there is no file.

    Args:
        path: The file.
        pairs: Ids of the session.

    Raises:
        FileFormatError: A line is no vote on a pair of the session. A last line without its end, which a machine that
            stopped leaves, is passed over: that vote was never confirmed.
    """
    if not path.exists():
        return []
    known = set(pairs)
    votes = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            vote = Vote.model_validate_json(line)
        except ValidationError:
            raise FileFormatError(
                f"Line {number} of {str(path)!r} is no vote: {line[:80].decode(errors='replace')!r}; mend or remove "
                "that line."
            ) from None
        if vote.pair not in known:
            raise FileFormatError(
                f"Line {number} of {str(path)!r} is a vote on the pair {vote.pair!r}, which the session does not "
                "have; remove that line."
            )
        votes.append(vote)
    return votes


def standing(votes: Iterable[Vote]) -> list[Vote]:
    """Return the last vote of each rater on each pair, in their order, without those that were taken back."""
    found: dict[tuple[str, str], Vote] = {}
    for vote in votes:
        found.pop((vote.rater, vote.pair), None)
        if vote.choice != "undo":
            found[vote.rater, vote.pair] = vote
    return list(found.values())
