"""The effective licence of an adapter: what its base, its data, its parents and its author allow together.

Expressions are parsed by `license-expression`, whose ScanCode index works offline. Every source counts, those of
parents too, and the strictest decides; of licences to choose among (OR) the choice that allows most is taken. A
licence nobody stated, or whose terms are not known here, is `unknown`, and unknown never adds up to "commercial use
is fine". This is a reading aid, not legal advice.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, Literal, NamedTuple

from haori.core.records import AdapterCard
from haori.library.licences.conflicts import conflicts
from haori.library.licences.sources import PERMISSIONS_LICENCE, Ingredient, ingredients, parse_licence
from haori.library.licences.terms import SEVERITY, Answer, Terms, permission_terms, terms_of

__all__ = ["Credit", "LicenceVerdict", "Question", "Source", "commercial_use", "effective_licence"]

Credit = Literal["required", "not required", "unknown"]
Question = Literal["commercial", "redistribution", "credit"]
_MOST_CHOICES = 1024


class Source(NamedTuple):
    """Something that an adapter was made from, with the terms it brings.

    Attributes:
        ingredient: What it is.
        terms: The licences that count, each with its terms: all of an AND, and the chosen ones of an OR.
    """

    ingredient: Ingredient
    terms: tuple[tuple[str, Terms], ...]

    @property
    def commercial(self) -> Answer:
        """Return whether it may be used commercially."""
        return _strictest(terms.commercial for _, terms in self.terms)

    @property
    def redistribution(self) -> Answer:
        """Return whether it may be shared."""
        return _strictest(terms.redistribution for _, terms in self.terms)

    @property
    def credit(self) -> Credit:
        """Return whether it must be credited."""
        return _joint_credit(_CREDIT[terms.credit] for _, terms in self.terms)

    @property
    def reason(self) -> str:
        """Return what it allows and asks, as a sentence."""
        stated = self.ingredient.licence or (
            "no licence stated" if self.ingredient.permissions is None else "permissions as Civitai asks them"
        )
        said = dict.fromkeys(terms.reason for _, terms in self.terms)
        return f"{self.ingredient.what}: {stated} ({'; '.join(said)})."


class LicenceVerdict(NamedTuple):
    """What may be done with an adapter.

    Attributes:
        expression: SPDX expression of everything that applies.
        commercial: Whether it may be used commercially.
        redistribution: Whether it may be shared.
        credit: Whether what it was made from must be credited.
        sources: What it was made from, in the order base, data, author, parents.
        conflicts: A sentence for each pair of licences that cannot be kept together when it is shared.
    """

    expression: str
    commercial: Answer
    redistribution: Answer
    credit: Credit
    sources: tuple[Source, ...]
    conflicts: tuple[str, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Return one sentence per source."""
        return tuple(source.reason for source in self.sources)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Return everything that must be done or kept to, each once, with the sources that ask for it."""
        asked: dict[str, list[str]] = {}
        for source in self.sources:
            for duty in (duty for _, terms in source.terms for duty in terms.duties):
                asked.setdefault(duty, []).append(source.ingredient.what)
        return tuple(f"{duty} ({'; '.join(dict.fromkeys(names))})" for duty, names in asked.items())

    def because(self, question: Question) -> tuple[str, ...]:
        """Return what decides an answer: the sources that allow least, after what conflicts."""
        answer = getattr(self, question)
        found = tuple(source.reason for source in self.sources if getattr(source, question) == answer)
        return (*self.conflicts, *found) if question == "redistribution" else found


def effective_licence(card: AdapterCard, ancestors: Iterable[AdapterCard] = ()) -> LicenceVerdict:
    """Combine the licences of everything an adapter was made from.

    Args:
        card: The adapter. Of one that was `added`, the licence and the permissions on the card are its author's terms.
        ancestors: Cards of the adapters it was made from, and of those these were made from (see
            `haori.library.lineage.ancestors`); one that is named and not given counts as unknown.
    """
    made_of = ingredients(card, ancestors)
    parsed = [parse_licence(PERMISSIONS_LICENCE if one.permissions else one.licence) for one in made_of]
    choices = [_choices(one, expression) for one, expression in zip(made_of, parsed, strict=True)]
    sources = min(_combinations(choices), key=_burden)
    clash = _conflicts(sources)
    return LicenceVerdict(
        expression=_join(parsed),
        commercial=_strictest(source.commercial for source in sources),
        redistribution="no" if clash else _strictest(source.redistribution for source in sources),
        credit=_joint_credit(source.credit for source in sources),
        sources=tuple(sources),
        conflicts=clash,
    )


def commercial_use(card: AdapterCard) -> Answer:
    """Return whether an adapter may be used commercially as far as its card alone tells, for lists.

    The terms of its parents are those in the licence on its card.
    """
    alone = ingredients(card if not card.parents else card.with_fields(parents=()))
    answers = [
        permission_terms(one.permissions).commercial if one.permissions else _commercial(one.licence) for one in alone
    ]
    return _strictest([*answers, _commercial(card.licence)] if card.parents else answers)


@lru_cache(maxsize=4096)
def _commercial(licence: str | None) -> Answer:
    ways = (_strictest(terms.commercial for _, terms in way) for way in _ways(parse_licence(licence)))
    return min(ways, key=SEVERITY.index)


_CREDIT: dict[bool | None, Credit] = {True: "required", False: "not required", None: "unknown"}


def _strictest(answers: Iterable[Answer]) -> Answer:
    return max(answers, key=SEVERITY.index)


def _joint_credit(asked: Iterable[Credit]) -> Credit:
    found = set(asked)
    return "required" if "required" in found else "unknown" if "unknown" in found else "not required"


def _choices(one: Ingredient, expression: Any) -> list[Source]:
    """Return the ways to satisfy the licence of one ingredient."""
    ways = [((PERMISSIONS_LICENCE, permission_terms(one.permissions)),)] if one.permissions else _ways(expression)
    if one.role == "author":  # the adapter is this work itself, not something made from it
        ways = [tuple((key, terms.of_itself()) for key, terms in way) for way in ways]
    return [Source(one, way) for way in ways]


def _ways(expression: Any) -> list[tuple[tuple[str, Terms], ...]]:
    kind = type(expression).__name__
    if kind == "OR":
        return [way for part in expression.args for way in _ways(part)]
    if kind == "AND":
        parts = [_ways(part) for part in expression.args]
        if math.prod(len(ways) for ways in parts) > _MOST_CHOICES:
            parts = [[min(ways, key=_weight)] for ways in parts]
        return [sum(chosen, ()) for chosen in product(*parts)]
    licence = getattr(expression, "license_symbol", None)
    if licence is None:
        return [((str(expression.key), terms_of(str(expression.key))),)]
    return [((str(expression), terms_of(str(licence.key)).excepted()),)]


def _weight(way: tuple[tuple[str, Terms], ...]) -> tuple[int, int]:
    return (
        max(SEVERITY.index(terms.commercial) for _, terms in way),
        max(SEVERITY.index(terms.redistribution) for _, terms in way),
    )


def _combinations(choices: Sequence[list[Source]]) -> Iterable[tuple[Source, ...]]:
    """Return every way to choose; where there are very many, the one that is best source by source."""
    if math.prod(len(ways) for ways in choices) <= _MOST_CHOICES:
        return product(*choices)
    return [tuple(min(ways, key=lambda way: _burden((way,))) for ways in choices)]


def _burden(sources: Sequence[Source]) -> tuple[int, int, int, int]:
    """Return how little a choice allows, for the least to be taken: use first, then sharing, then duties."""
    answers = [(SEVERITY.index(one.commercial), SEVERITY.index(one.redistribution)) for one in sources]
    used, shared = (max(values) for values in zip(*answers, strict=True))
    credits = sum(one.credit != "not required" for one in sources)
    return used, 3 if _conflicts(sources) else shared, sum(map(sum, answers)), credits


def _conflicts(sources: Iterable[Source]) -> tuple[str, ...]:
    return conflicts([(f"{key} ({one.ingredient.what})", terms) for one in sources for key, terms in one.terms])


def _join(expressions: Sequence[Any]) -> str:
    from license_expression import combine_expressions

    from haori.bases.licence import licensing

    texts = [expression.render() for expression in expressions]
    return str(combine_expressions(texts, relation="AND", unique=True, licensing=licensing()))
