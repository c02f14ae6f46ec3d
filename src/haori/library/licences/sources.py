"""What an adapter was made from, each thing with the licence stated for it.

Base, data and its author count, and all that its parents were made from in turn.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from haori.core.hashing import short
from haori.core.records import AdapterCard, Permissions
from haori.library.licences.terms import UNKNOWN_LICENCE

__all__ = ["PERMISSIONS_LICENCE", "Ingredient", "ingredients", "parse_licence"]

PERMISSIONS_LICENCE = "LicenseRef-Civitai-permissions"
"""What stands in an expression for the answers to Civitai's four questions."""

_LONGEST, _DEEPEST = 20_000, 200


class Ingredient(NamedTuple):
    """One thing that an adapter was made from.

    Attributes:
        role: What it was to the adapter; `checkpoint` is what it was extracted from, `author` the adapter itself.
        name: Its name or path.
        via: Name of the parent that it comes through, if it does.
        licence: The licence as stated; None where nothing was.
        attribution: How its author wants to be credited.
        permissions: What its author permits, instead of a licence.
        source: Where it came from, for a base.
    """

    role: Literal["base", "data", "checkpoint", "parent", "author"]
    name: str
    via: str | None
    licence: str | None
    attribution: str | None = None
    permissions: Permissions | None = None
    source: str | None = None

    @property
    def what(self) -> str:
        """Return it in words, such as `data reviews.jsonl`."""
        own = "the adapter's author" if self.role == "author" else f"{self.role} {self.name}"
        return own if self.via is None else f"{own}, through {self.via}"


def ingredients(card: AdapterCard, ancestors: Iterable[AdapterCard] = ()) -> tuple[Ingredient, ...]:
    """Return everything an adapter was made from: base, data, its author's terms, then what its parents bring.

    What comes a second time through a parent, such as the same base, is left out there.

    Args:
        card: The adapter.
        ancestors: Cards of its parents and of theirs; one that is named and not given is listed without a licence.
    """
    found: dict[tuple[Any, ...], Ingredient] = {}
    for one in _of(card, {each.id: each for each in ancestors}, None, set()):
        found.setdefault((one.role, one.name, one.licence, one.permissions), one)
    return tuple(found.values())


@lru_cache(maxsize=4096)
def parse_licence(licence: str | None) -> Any:
    """Return a licence expression tree; hub ids become SPDX ids, and free text a LicenseRef of its own.

    What is longer or nested deeper than any licence is unknown.
    """
    from license_expression import ExpressionError, ParseError

    from haori.bases.licence import licensing, to_spdx

    known = licensing()
    if licence is not None and (len(licence) > _LONGEST or licence.count("(") > _DEEPEST):
        return known.parse(UNKNOWN_LICENCE)
    try:
        expression = known.parse(licence or UNKNOWN_LICENCE)
    except (ExpressionError, ParseError):
        expression = known.parse(to_spdx(str(licence)) or UNKNOWN_LICENCE)
    if expression is None:
        return known.parse(UNKNOWN_LICENCE)
    foreign = {
        symbol: known.parse(to_spdx(symbol.key) or UNKNOWN_LICENCE)
        for symbol in expression.symbols
        if not str(symbol).startswith("LicenseRef-") and known.unknown_license_keys(str(symbol))
    }
    return expression.subs(foreign) if foreign else expression


def _of(card: AdapterCard, known: dict[str, AdapterCard], via: str | None, seen: set[str]) -> Iterator[Ingredient]:
    base = Ingredient("base", card.base.name, via, card.base.licence, source=card.base.source)
    data = [Ingredient("data", one.source, via, one.licence, one.attribution) for one in card.data]
    below: list[Ingredient] = []
    for identity in card.parents:
        parent = known.get(identity)
        if identity in seen:
            continue
        seen.add(identity)
        missing = Ingredient("parent", f"{short(identity)}, not in the library", None, None)
        below.extend([missing] if parent is None else _of(parent, known, _name(parent), seen))
    yield from (base, *data, *_author(card, via, [base, *data, *below]), *below)


def _author(card: AdapterCard, via: str | None, made_of: list[Ingredient]) -> Iterator[Ingredient]:
    """Yield the terms of whoever made the adapter; where it was made here, what they add to those it is made of."""
    own = Ingredient("author" if via is None else "parent", _name(card), None, card.licence)
    if card.combination is not None and card.combination.kind == "extract":
        yield Ingredient("checkpoint", card.combination.tuned or "unnamed", via, card.licence)
        return
    if card.permissions is not None:
        yield own._replace(licence=None, permissions=card.permissions)
    if card.origin == "added" and (card.licence is not None or card.permissions is None):
        yield own
    if card.origin != "added" and card.licence is not None and _adds(card.licence, made_of):
        yield own


def _adds(own: str, made_of: Iterable[Ingredient]) -> bool:
    """Say whether the licence of an adapter made here names terms that what it was made from does not bring."""
    brought = {
        str(symbol)
        for one in made_of
        for symbol in parse_licence(PERMISSIONS_LICENCE if one.permissions else one.licence).symbols
    }
    return bool({str(symbol) for symbol in parse_licence(own).symbols} - brought - {UNKNOWN_LICENCE})


def _name(card: AdapterCard) -> str:
    return card.names[-1] if card.names else short(card.id)
