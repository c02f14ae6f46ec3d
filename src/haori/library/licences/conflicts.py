"""Licences that cannot bind one shared work together, such as CC-BY-SA and CC-BY-NC, or GPL-2.0-only and Apache-2.0.

Either two want to be the only one, or one does and forbids what another adds.

Sources: compatible licences of Creative Commons; the FSF's compatibility matrix of the GPL versions and its list of
licences; GPL-2.0 section 6, GPL-3.0 sections 7 and 13, CC-BY-SA-4.0 section 3(b), ODbL-1.0 section 4.4.
"""

from collections.abc import Sequence
from itertools import combinations

from haori.library.licences.terms import FORBIDS, Limit, Terms

__all__ = ["conflicts"]


_LIMITS: dict[Limit, str] = {
    "non-commercial": "restriction to non-commercial use",
    "use restrictions": "restrictions of use",
    "patent clause": "patent clause",
    "advertising clause": "advertising clause",
}


def conflicts(bound: Sequence[tuple[str, Terms]]) -> tuple[str, ...]:
    """Return a sentence for each pair of licences under which nothing made from both may be shared.

    Args:
        bound: Every licence that applies, each with the words by which a person knows it.
    """
    alike = [(label, terms.shared_under) for label, terms in bound if terms.shared_under is not None]
    if not alike:
        return ()
    apart = [
        f"{one} and {other} each want what is made from them shared under their own terms: what is made from both "
        "cannot be shared."
        for (one, first), (other, second) in combinations(alike, 2)
        if not first & second
    ]
    if apart:
        return tuple(apart)
    together = frozenset.intersection(*(targets for _, targets in alike))
    if not together:
        names = ", ".join(label for label, _ in alike)
        return (f"No licence satisfies all of {names}, so what is made from them cannot be shared.",)
    blocked = {target: _blocking(bound, target) for target in sorted(together)}
    target = min(blocked, key=lambda name: len(blocked[name]))
    wants = alike[0][0]
    return tuple(
        f"{wants} wants what is made from it shared under {target}, which forbids the {_LIMITS[limit]} that {label} "
        "adds: what is made from both cannot be shared."
        for label, limit in blocked[target]
    )


def _blocking(bound: Sequence[tuple[str, Terms]], target: str) -> list[tuple[str, Limit]]:
    """Return the licences whose terms may not be added to a work under `target`, each with the first such term."""
    forbidden = next(limits for name, limits in FORBIDS if target.startswith(name))
    return [(label, min(terms.limits & forbidden)) for label, terms in bound if terms.limits & forbidden]
