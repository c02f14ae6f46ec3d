"""Pairs to be rated: which two systems, on what, and which of them stands on the left, all by chance from a seed."""

import random
from collections.abc import Sequence
from itertools import combinations

from haori.core.base_reference import Record
from haori.core.errors import InputError

__all__ = ["Pair", "PairKey", "make_pairs"]


class Pair(Record):
    """What a rater may see of a pair.

    Attributes:
        id: Its number in the order of rating, from `001`.
        prompt: What was asked for, without anything that tells the systems apart.
    """

    id: str
    prompt: str


class PairKey(Record):
    """What a rater must not see of a pair.

    Attributes:
        id: That of the pair.
        item: What both systems were asked for; the same in every pair of it.
        left: System whose work stands on the left.
        right: The other.
    """

    id: str
    item: str
    left: str
    right: str


def make_pairs(
    systems: Sequence[str], prompts: dict[str, str], *, seed: int, most: int | None = None
) -> tuple[list[Pair], list[PairKey]]:
    """Return pairs in random order with their key.

    Every two systems meet on every item. Each stands on the left in half of their meetings, or one more, so that a
    liking for one side favours none of them.

    Args:
        systems: Two or more names.
        prompts: Prompt by item.
        seed: Of the order and of the sides.
        most: Number of pairs, taken by chance and as evenly over every two systems as can be; all if not given.

    Raises:
        InputError: There are fewer than two systems, or `most` is below the number of every two systems.
    """
    if len(systems) < 2:
        raise InputError("Rating compares two systems or more; give at least two.")
    chance = random.Random(seed)  # noqa: S311 - an order, not a secret
    meetings: list[list[tuple[str, str, str]]] = []
    for first, second in combinations(systems, 2):
        items = chance.sample(sorted(prompts), len(prompts))
        swapped = chance.random() < 0.5
        meetings.append(
            [
                (item, *((first, second) if (at % 2 == 0) != swapped else (second, first)))
                for at, item in enumerate(items)
            ]
        )
    if most is not None and most < len(meetings):
        raise InputError(
            f"{most} pairs do not let every two of {len(systems)} systems meet; that takes {len(meetings)} at least."
        )
    kept = [meeting for meeting_round in zip(*meetings, strict=True) for meeting in meeting_round][:most]
    chance.shuffle(kept)
    digits = max(3, len(str(len(kept))))
    keys = [
        PairKey(id=f"{number:0{digits}d}", item=item, left=left, right=right)
        for number, (item, left, right) in enumerate(kept, 1)
    ]
    return [Pair(id=key.id, prompt=prompts[key.item]) for key in keys], keys
