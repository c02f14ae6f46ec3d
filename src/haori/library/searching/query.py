"""What a search asks for: words, filters such as `base:sd15`, and comparisons such as `accuracy>0.8`.

A word may be anywhere in what is known of an adapter; a filter looks at one field, a comparison at one figure. All of
them must hold. What has a space in it is quoted: `tag:"soft light"`.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal, NamedTuple

from haori.core.errors import InputError, nearest

__all__ = ["FILTERS", "Comparison", "Filter", "Query", "folded", "parse_query"]

FILTERS = ("base", "licence", "tag", "trigger", "method", "format", "task", "mount")
_SPELLINGS = {"license": "licence", "family": "base", "tags": "tag"}
# What stands before a colon in names and addresses that cards hold; such a word is a word.
_SCHEMES = frozenset({"hub", "folder", "wheel", "gguf", "civitai", "http", "https", "sha256"})
_PART = re.compile(r'(?P<key>[A-Za-z][\w-]*:)?"(?P<quoted>[^"]*)"|(?P<plain>\S+)')
_COMPARISON = re.compile(r"(?P<name>[A-Za-z][\w.-]*?)(?P<sign>>=|<=|>|<)(?P<value>[^<>=]*)")

Sign = Literal[">", ">=", "<", "<="]


class Filter(NamedTuple):
    """One field must have this value, folded."""

    field: str
    value: str


class Comparison(NamedTuple):
    """A figure of an adapter must be so: a metric it was measured by, its `rank`, or its size in `mb`."""

    figure: str
    sign: Sign
    value: float


@dataclass(frozen=True)
class Query:
    """A search, read. Words are folded."""

    words: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


def folded(text: str) -> str:
    """Return `text` as it is compared: without differences of case and of Unicode forms."""
    return unicodedata.normalize("NFKC", text).casefold()


def parse_query(text: str) -> Query:
    """Read what was typed.

    Raises:
        InputError: A filter is not known or empty, or a figure is compared with what is no number.
    """
    words: list[str] = []
    filters: list[Filter] = []
    comparisons: list[Comparison] = []
    for part in _PART.finditer(text):
        if part["plain"] is None:
            key, value = part["key"], part["quoted"]
        elif (compared := _COMPARISON.fullmatch(part["plain"])) is not None:
            comparisons.append(_comparison(compared))
            continue
        else:
            before, colon, after = part["plain"].partition(":")
            is_key = colon and before.isidentifier() and before.casefold() not in _SCHEMES
            key, value = (before + colon, after.replace('"', "")) if is_key else (None, part["plain"])
        if key is not None:
            filters.append(_filter(key[:-1].casefold(), value))
        elif value.strip():
            words.append(folded(value.strip()))
    return Query(tuple(words), tuple(filters), tuple(comparisons))


def _filter(key: str, value: str) -> Filter:
    field = _SPELLINGS.get(key, key)
    if field not in FILTERS:
        hint = nearest(key, FILTERS) or f"the filters are {', '.join(FILTERS)}."
        raise InputError(f"There is no filter {key[:40]!r} to search by; {hint}")
    if not value.strip():
        raise InputError(f"The filter {key!r} needs a value behind the colon, such as {field}:VALUE.")
    return Filter(field, folded(value.strip()))


def _comparison(found: "re.Match[str]") -> Comparison:
    try:
        value = float(found["value"])
    except ValueError:
        raise InputError(
            f"{found[0][:60]!r} compares {found['name']!r} with {found['value'][:40]!r}, which is no number; "
            "write, for example, accuracy>0.8."
        ) from None
    sign: Sign = found["sign"]  # type: ignore[assignment]  # the expression matches no other
    return Comparison(found["name"], sign, value)
