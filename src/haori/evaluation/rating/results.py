"""What votes say: wins of every two systems, strengths of all after Bradley and Terry, and the liking for one side.

A pure function of key and votes. Intervals of strengths are drawn over items (what was asked for), since votes on the
same item are not independent of one another.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from pydantic import Field

from haori.core.base_reference import Record
from haori.evaluation.bootstrap import RESAMPLES, draws
from haori.evaluation.rating.pairs import PairKey
from haori.evaluation.rating.votes import Vote, standing
from haori.metrics.bradley_terry import bradley_terry, has_strengths, reachable
from haori.metrics.proportions import Share, sign_test, wilson
from haori.metrics.statistics import Array

__all__ = ["Meeting", "RatingResults", "Strength", "rating_results"]

_LOST = 0.025  # share of resamples without strengths beyond which an end of the interval is among them
_FEW = 20  # prompts with seeds below which a bootstrap over them is too narrow
_RELIABLE = 10  # decided votes below which a liking for one side cannot show


class Meeting(Record):
    """Two systems against each other.

    Attributes:
        first: A system.
        second: The other.
        wins: Votes for the first.
        losses: Votes for the second.
        ties: Votes for neither.
        share: wins / (wins + losses) with Wilson's 95% interval; None without any.
        p_value: Sign test, two-sided and exact, over wins and losses.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    share: Share | None
    p_value: float


class Strength(Record):
    """A system's strength.

    Attributes:
        system: Its name.
        value: In the logarithm of odds; the mean over systems is 0.
        low: End of its 95% interval; None where there is none, as a note says.
        high: The other end.
    """

    system: str
    value: float
    low: float | None = None
    high: float | None = None


class RatingResults(Record):
    """Everything that a session of ratings says.

    Attributes:
        pairs: Pairs of the session.
        votes: Votes that stand, those for neither side and without an answer included.
        ties: Votes for neither side.
        skips: Pairs passed over.
        raters: Number of people.
        meetings: Every two systems that have votes.
        strengths: The strongest first; empty where they are not defined, as a note says.
        left: Share of the decided votes that are for the left side.
        notes: A sentence each.
    """

    pairs: int
    votes: int
    ties: int
    skips: int
    raters: int
    meetings: tuple[Meeting, ...]
    strengths: tuple[Strength, ...] = ()
    left: Share | None = None
    notes: tuple[str, ...] = Field(default=())


def rating_results(
    systems: Sequence[str], keys: Sequence[PairKey], votes: Sequence[Vote], *, resamples: int = RESAMPLES
) -> RatingResults:
    """Count votes and say what they mean.

    Args:
        systems: Their names.
        keys: Of all pairs.
        votes: All lines, in their order.
        resamples: Of the bootstrap.
    """
    by_id = {key.id: key for key in keys}
    given = standing(votes)
    answered = [vote for vote in given if vote.choice != "skip"]
    decided = [vote for vote in answered if vote.choice != "tie"]
    tables = _tables(systems, by_id, answered)
    strengths, notes = _strengths(systems, tables, resamples) if answered else ((), [])
    left = wilson(sum(vote.choice == "left" for vote in decided), len(decided))
    raters = len({vote.rater for vote in given})
    if not answered:
        notes = ["There are no votes yet."]
    if raters > 1:
        notes.append(
            "Votes of several people on the same pairs are not independent, so the intervals of shares are too narrow."
        )
    if left and (left.low > 0.5 or left.high < 0.5):
        side = "left" if left.value > 0.5 else "right"
        notes.append(
            f"The {side} side was chosen more often than chance would have it. Systems stand on both sides equally "
            "often, so none gains by it, but votes that go by the side tell nothing: they blur what there is."
        )
    elif left and len(decided) < _RELIABLE:
        notes.append(f"Of {len(decided)} decided votes a liking for one side could not be told from chance.")
    return RatingResults(
        pairs=len(keys),
        votes=len(given),
        ties=len(answered) - len(decided),
        skips=len(given) - len(answered),
        raters=raters,
        meetings=_meetings(systems, by_id, answered),
        strengths=strengths,
        left=left,
        notes=tuple(notes),
    )


def _winner(vote: Vote, key: PairKey) -> tuple[str, str]:
    return (key.left, key.right) if vote.choice == "left" else (key.right, key.left)


def _meetings(systems: Sequence[str], keys: dict[str, PairKey], answered: Sequence[Vote]) -> tuple[Meeting, ...]:
    found = []
    for first, second in combinations(systems, 2):
        here = [vote for vote in answered if {keys[vote.pair].left, keys[vote.pair].right} == {first, second}]
        if not here:
            continue
        ties = sum(vote.choice == "tie" for vote in here)
        wins = sum(vote.choice != "tie" and _winner(vote, keys[vote.pair])[0] == first for vote in here)
        losses = len(here) - ties - wins
        found.append(
            Meeting(
                first=first, second=second, wins=wins, losses=losses, ties=ties,
                share=wilson(wins, wins + losses), p_value=sign_test(wins, losses),
            )
        )  # fmt: skip
    return tuple(found)


def _tables(systems: Sequence[str], keys: dict[str, PairKey], answered: Sequence[Vote]) -> Array:
    """Return [n, K, K], the wins on each of the n items that have votes; ties are half a win for both."""
    place = {system: at for at, system in enumerate(systems)}
    items = sorted({keys[vote.pair].item for vote in answered})
    row = {item: at for at, item in enumerate(items)}
    tables = np.zeros((len(items), len(systems), len(systems)))
    for vote in answered:
        key = keys[vote.pair]
        winner, loser = (place[name] for name in _winner(vote, key))
        if vote.choice == "tie":
            tables[row[key.item], [winner, loser], [loser, winner]] += 0.5
        else:
            tables[row[key.item], winner, loser] += 1
    return tables


def _strengths(systems: Sequence[str], tables: Array, resamples: int) -> tuple[tuple[Strength, ...], list[str]]:
    wins = tables.sum(axis=0)
    if reason := _why_none(systems, wins):
        return (), [reason]
    values = bradley_terry(wins)
    order = np.argsort(-values, kind="stable")
    n = len(tables)
    plain = tuple(Strength(system=systems[at], value=float(values[at])) for at in order)
    if n < 2:
        return plain, ["All votes are on one prompt and seed, so strengths have no intervals; rate more."]
    drawn = np.concatenate([np.einsum("rn,nij->rij", counts, tables) for counts in draws(n, resamples, 0)])
    defined = drawn[has_strengths(drawn)]
    lost = 1 - len(defined) / resamples
    if lost > _LOST:
        return plain, [
            f"Strengths have no intervals: in {lost:.0%} of the bootstrap's draws a system wins or loses everything, "
            "so an end lies at infinity. More votes are needed."
        ]
    low, high = np.percentile(bradley_terry(defined), (2.5, 97.5), axis=0)
    notes = []
    if n < _FEW:
        notes = [
            f"Intervals of strengths are drawn over {n} prompts with seeds; of fewer than {_FEW} they are too narrow."
        ]
    return tuple(
        Strength(system=systems[at], value=float(values[at]), low=float(low[at]), high=float(high[at])) for at in order
    ), notes


def _why_none(systems: Sequence[str], wins: Array) -> str | None:
    """Say why there are no finite strengths, if so."""
    if has_strengths(wins):
        return None
    met = reachable(wins + wins.T)
    if not met.all():
        apart = [name for name, met_first in zip(systems, met[0], strict=True) if not met_first]
        return (
            f"There are no strengths: {' and '.join(apart)} and {systems[0]} have not been compared, directly or "
            "through others. Rate more pairs."
        )
    above = reachable(wins)
    # One whom chains of wins lead to from nobody but its equals.
    top = next(at for at in range(len(systems)) if (above[at] | ~above[:, at]).all())
    unbeaten = [name for name, equal in zip(systems, above[:, top], strict=True) if equal]
    others = [name for name in systems if name not in unbeaten]
    return (
        f"There are no strengths: {' and '.join(unbeaten)} neither lost nor tied against {' and '.join(others)}, so "
        "the distance has no finite estimate. The wins above are what is known; more votes may change that."
    )
