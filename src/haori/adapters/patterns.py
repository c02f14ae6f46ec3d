"""Tables such as `rank_pattern` and `alpha_pattern`: which key counts for a module, and whether order decides.

PEFT takes the first key that fits the end of a module's name, as a regular expression. Its own file sorts the keys, so
where two of them give one module different values, an adapter that is saved and loaded is another one. Knows nothing
of torch or PEFT.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from haori.core.errors import InputError

__all__ = ["Clash", "clash_of", "exact_key", "exact_patterns", "refuse_clash"]

_V = TypeVar("_V")


class Clash(NamedTuple):
    """Two keys of a pattern that give one module different values; the first counts."""

    module: str
    first: str
    second: str


def clash_of(pattern: Mapping[str, Any], modules: Iterable[str]) -> Clash | None:
    """Return the first module whose value depends on the order of the keys; None where none does."""
    if len(pattern) < 2 or len({repr(value) for value in pattern.values()}) < 2:
        return None
    fits = _fits(pattern)
    for module in modules:
        found = [key for key, expression in fits.items() if expression.match(module)]
        other = next((key for key in found if pattern[key] != pattern[found[0]]), None)
        if other is not None:
            return Clash(module, found[0], other)
    return None


def refuse_clash(field: str, pattern: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Refuse a pattern of a recipe in which order decides.

    Raises:
        InputError: Two keys give one module different values.
    """
    if clash := clash_of(pattern, modules):
        raise InputError(
            f"The keys {clash.first!r} and {clash.second!r} of method.{field} both fit {clash.module!r} and give it "
            f"{pattern[clash.first]!r} and {pattern[clash.second]!r}; let only one of them fit each module."
        )


def exact_patterns(pattern: Mapping[str, _V], modules: Iterable[str]) -> dict[str, _V]:
    """Return an equal pattern with one key for each module, which fits no other.

    Args:
        pattern: The pattern, of which the first key that fits counts.
        modules: Full names of all modules that have a value.
    """
    names = sorted(set(modules))
    fits = _fits(pattern)
    values: dict[str, _V] = {}
    for name in names:
        key = next((key for key, expression in fits.items() if expression.match(name)), None)
        if key is not None:
            values[name] = pattern[key]
        elif name in pattern:  # PEFT looks a name up as it is where no expression fits
            values[name] = pattern[name]
    return {exact_key(name, names): value for name, value in values.items()}


def exact_key(name: str, names: Iterable[str]) -> str:
    """Return a key that fits the module `name` and no other of `names`: the name itself where that is enough."""
    expression = _expression(name)
    alone = all(other == name or not expression.match(other) for other in names)
    return name if alone and expression.match(name) else f"^{re.escape(name)}"


def _fits(pattern: Iterable[str]) -> dict[str, re.Pattern[str]]:
    return {key: _expression(key) for key in pattern}


def _expression(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")
