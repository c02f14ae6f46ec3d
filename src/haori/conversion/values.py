"""Values as other tools spell them, as the plain values of a recipe.

Each function raises UnfitValueError with what the value should be, as the rest of a sentence ("be a number").
"""

import math
from typing import Any

__all__ = ["UnfitValueError", "flag", "hub_or_file", "modules", "number", "plain", "text", "whole", "words"]


class UnfitValueError(ValueError):
    """A value cannot be what it is; the message is the rest of "it should ..."."""


_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0", "none"}


def plain(value: Any) -> Any:
    """Return the value itself."""
    return value


def number(value: Any) -> float:
    """Return a number, which may be a text such as "2e-5" (as YAML reads it)."""
    if isinstance(value, bool):
        raise UnfitValueError("be a number")
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise UnfitValueError("be a number") from None
    if not math.isfinite(found):
        raise UnfitValueError("be a finite number")
    return value if isinstance(value, int) else found


def whole(value: Any) -> int:
    """Return a whole number."""
    found = number(value)
    if found != int(found):
        raise UnfitValueError("be a whole number")
    return int(found)


def flag(value: Any) -> bool:
    """Return a truth value."""
    spelt = str(value).strip().lower()
    if spelt not in _TRUE | _FALSE:
        raise UnfitValueError("be true or false")
    return spelt in _TRUE


def text(value: Any) -> str:
    """Return a text."""
    if not isinstance(value, str):
        raise UnfitValueError("be a text")
    return value


def words(value: Any) -> list[str]:
    """Return a list of texts, which may be one text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise UnfitValueError("be a list of texts, or one text with commas")
    return [item.strip() for item in items if item.strip()]


def modules(value: Any) -> str | list[str]:
    """Return target modules: `all` and `all-linear` are ours, a text that is no list is a regular expression."""
    if isinstance(value, str) and set("\\^$*+?()[]{}|") & set(value):
        return value
    found = words(value)
    if {item.lower() for item in found} & {"all", "all-linear", "all_linear"}:
        return "all-linear"
    return found


def hub_or_file(value: Any) -> str:
    """Return where a model or data lies."""
    found = text(value).strip()
    if not found:
        raise UnfitValueError("be a path or a name on the hub")
    return found
