"""The effective licence of an adapter: base AND datasets AND parents, and whether commercial use is covered.

Expressions are parsed by `license-expression`, whose ScanCode index works offline. A licence nobody stated, or whose
terms are not in the tables here, is `unknown`, and unknown never adds up to "commercial use is fine". This is a
reading aid, not legal advice.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from haori.core.records import AdapterCard

__all__ = ["Commercial", "LicenceVerdict", "effective_licence"]

Commercial = Literal["yes", "conditions", "unknown", "no"]
_UNKNOWN = "LicenseRef-scancode-unknown"
_SEVERITY: tuple[Commercial, ...] = ("yes", "conditions", "unknown", "no")


class LicenceVerdict(NamedTuple):
    """What may be done with an adapter.

    Attributes:
        expression: SPDX expression of everything that applies.
        commercial: Whether commercial use is covered: yes, under conditions, unknown, or no.
        reasons: One sentence per source, in the order base, data, parents.
    """

    expression: str
    commercial: Commercial
    reasons: tuple[str, ...]


class _Source(NamedTuple):
    what: str
    licence: str | None


# First match decides. Licences the ScanCode index files under "Proprietary Free" and the like need a line of their own.
_TERMS: tuple[tuple[str, Commercial, str], ...] = (
    (
        r"CC-BY-NC-|-nc(-|$)|non-?commercial|llama-license-2023",
        "no",
        "non-commercial use only, and derivatives inherit that",
    ),
    (r"CC-BY-ND-", "no", "no adapted versions may be shared"),
    (
        r"llama-(2|3|4)",
        "conditions",
        'free below 700 million monthly users; say "Built with Llama" and begin the name of what you share with Llama',
    ),
    (r"gemma", "yes", "pass on the prohibited-use policy"),
    (r"(open-?)?rail", "yes", "pass on the use restrictions"),
    (r"^CC-BY-SA-|^ODbL-", "conditions", "credit the source and share adapted versions under the same licence"),
    (r"^CC-BY-\d|^ODC-By-", "yes", "credit the source"),
)  # fmt: skip
_CATEGORIES: dict[str, tuple[Commercial, str]] = {
    "Permissive": ("yes", "keep the notices"),
    "Public Domain": ("yes", "no duties"),
    "Copyleft": ("conditions", "copyleft: what you share falls under the same licence"),
    "Copyleft Limited": ("conditions", "limited copyleft: what you share may fall under the same licence"),
}


def effective_licence(card: AdapterCard, parents: Sequence[AdapterCard] = ()) -> LicenceVerdict:
    """Combine the licences of everything an adapter was made from.

    Args:
        card: The adapter. The licence on the card of an `added` adapter counts as one source: its author's terms.
        parents: Cards of the adapters named in `card.parents`; one that is not given counts as unknown.
    """
    sources = list(_sources(card, parents))
    parsed = [_parse(source.licence) for source in sources]
    verdicts = [_verdict(expression) for expression in parsed]
    reasons = tuple(
        f"{source.what}: {source.licence or 'no licence stated'} ({reason})."
        for source, (_, reason) in zip(sources, verdicts, strict=True)
    )
    return LicenceVerdict(_join(parsed), max((v for v, _ in verdicts), key=_SEVERITY.index), reasons)


def _sources(card: AdapterCard, parents: Sequence[AdapterCard]) -> Iterable[_Source]:
    yield _Source(f"base {card.base.name}", card.base.licence)
    for data in card.data:
        yield _Source(f"data {data.source}", data.licence)
    if card.origin == "added":
        yield _Source("the adapter's author", card.licence)
    known = {parent.id: parent for parent in parents}
    for identity in card.parents:
        parent = known.get(identity)
        label = parent.names[-1] if parent is not None and parent.names else identity.removeprefix("sha256:")[:12]
        yield _Source(f"parent {label}", parent.licence if parent is not None else None)


def _parse(licence: str | None) -> Any:
    """Return a licence expression tree; hub ids become SPDX ids, and free text a LicenseRef of its own."""
    from license_expression import ExpressionError, ParseError

    from haori.bases.licence import to_spdx

    licensing = _licensing()
    try:
        expression = licensing.parse(licence or _UNKNOWN)
    except (ExpressionError, ParseError):
        expression = licensing.parse(to_spdx(str(licence)) or _UNKNOWN)
    if expression is None:
        return licensing.parse(_UNKNOWN)
    foreign = {
        symbol: licensing.parse(to_spdx(symbol.key) or _UNKNOWN)
        for symbol in expression.symbols
        if not str(symbol).startswith("LicenseRef-") and licensing.unknown_license_keys(str(symbol))
    }
    return expression.subs(foreign) if foreign else expression


def _join(expressions: Sequence[Any]) -> str:
    from license_expression import combine_expressions

    texts = [expression.render() for expression in expressions]
    return str(combine_expressions(texts, relation="AND", unique=True, licensing=_licensing()))


@lru_cache(maxsize=1)
def _licensing() -> Any:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


def _verdict(expression: Any) -> tuple[Commercial, str]:
    """AND takes the strictest part, OR the freest; a licence WITH an exception counts as the licence."""
    kind = type(expression).__name__
    if kind in {"AND", "OR"}:
        parts = [_verdict(part) for part in expression.args]
        choose = max if kind == "AND" else min
        return choose(parts, key=lambda part: _SEVERITY.index(part[0]))
    symbol = getattr(expression, "license_symbol", expression)
    return _terms(str(symbol.key))


def _terms(key: str) -> tuple[Commercial, str]:
    for pattern, verdict, reason in _TERMS:
        if re.search(pattern, key, flags=re.IGNORECASE):
            return verdict, reason
    if key == _UNKNOWN:
        return "unknown", "unknown terms, so nothing can be said about commercial use"
    category = _categories().get(key.lower())
    return _CATEGORIES.get(category or "", ("unknown", "terms not known here; read the licence"))


@lru_cache(maxsize=1)
def _categories() -> dict[str, str]:
    """Return ScanCode's category of every SPDX id, in lower case."""
    from license_expression import vendored_scancode_licensedb_index_location

    rows = json.loads(Path(vendored_scancode_licensedb_index_location).read_text(encoding="utf-8"))
    table = {}
    for row in rows:
        for key in (row.get("spdx_license_key"), *row.get("other_spdx_license_keys", [])):
            if key:
                table[key.lower()] = row.get("category") or ""
    return table
