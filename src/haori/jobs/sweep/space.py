"""What a sweep tries: recipe keys with choices or ranges, read from `key=...` and checked against the recipe.

    method.rank=4,8,16            choices
    optimizer.lr=log:1e-5:1e-3    between two numbers, evenly in the logarithm
    method.dropout=lin:0:0.2      between two numbers, evenly
    training.epochs=int:1:5       whole numbers, both ends included

`lora.rank` is `method.rank` where the recipe's method is lora. Knows nothing about how trials are chosen or run.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from haori.core.errors import RecipeError
from haori.core.methods import METHODS
from haori.tasks.recipe import recipe_from

__all__ = ["Choices", "Numbers", "Range", "grid", "overrides_of", "parse_space", "size"]

_SYNTAX = "write key=a,b,c or key=log:low:high, key=lin:low:high, key=int:low:high"
_OTHER_LOSS = ("data", "loss", "name", "base", "revision", "task")


class Choices(NamedTuple):
    """A few values, as written in YAML."""

    key: str
    values: tuple[str, ...]


class Numbers(NamedTuple):
    """All numbers from `low` to `high`."""

    key: str
    scale: Literal["log", "lin", "int"]
    low: float
    high: float


Range = Choices | Numbers


def parse_space(items: Sequence[str], recipe: Mapping[str, Any]) -> tuple[Range, ...]:
    """Read ranges and check every choice and every end of a range against the recipe.

    Args:
        items: `key=...`, one per key.
        recipe: The recipe's document, as `recipe_from` takes it.

    Raises:
        RecipeError: A key is unknown or changes what validation loss means, or a value is not allowed.
    """
    if not items:
        raise RecipeError(f"A sweep needs at least one key to vary; {_SYNTAX} after --over.")
    kind = recipe_from(recipe).method.kind
    found: dict[str, Range] = {}
    for item in items:
        one = _parse(item, kind)
        if one.key in found:
            raise RecipeError(f"The key {one.key!r} is to be varied twice; give it once, with all its values.")
        for text in one.values if isinstance(one, Choices) else _probes(one):
            _check_value(recipe, one, text)
        found[one.key] = one
    space = tuple(found.values())
    if (count := size(space)) is not None and count <= _CHECKED_WHOLE:
        for values in grid(space):
            recipe_from(recipe, overrides_of(values))
    return space


_CHECKED_WHOLE = 500  # combinations; more of them are checked one by one as they come up


def size(space: Sequence[Range]) -> int | None:
    """Return the number of combinations, or None if there are infinitely many."""
    counts = [_count(one) for one in space]
    return math.prod(count for count in counts if count) if all(counts) else None


def grid(space: Sequence[Range]) -> Iterator[dict[str, str | int]]:
    """Yield every combination of a finite space, the last key changing fastest."""
    lists: list[list[str | int]] = []
    for one in space:
        if isinstance(one, Choices):
            lists.append(list(one.values))
        else:
            lists.append(list(range(int(one.low), int(one.high) + 1)))
    for values in itertools.product(*lists):
        yield dict(zip((one.key for one in space), values, strict=True))


def overrides_of(values: Mapping[str, str | int | float]) -> list[str]:
    """Return values as the overrides that `recipe_from` takes."""
    return [f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()]


def _parse(item: str, kind: str) -> Range:
    key, separator, text = (part.strip() for part in item.partition("="))
    if not separator or not key or not text:
        raise RecipeError(f"{item!r} is no range to vary; {_SYNTAX}.")
    key = _full_key(key, kind)
    scale, colon, rest = text.partition(":")
    if not colon or scale not in {"log", "lin", "int"}:
        return _choices(key, text, item)
    ends = rest.split(":")
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        raise RecipeError(f"The range in {item!r} needs two numbers; {_SYNTAX}.") from None
    if not (math.isfinite(low) and math.isfinite(high)) or low >= high:
        raise RecipeError(f"The range in {item!r} must go from a lower to a higher number.")
    if scale == "log" and low <= 0:
        raise RecipeError(f"The range in {item!r} must begin above 0, since it is even in the logarithm.")
    if scale == "int" and (low != int(low) or high != int(high)):
        raise RecipeError(f"The range in {item!r} must go from one whole number to another.")
    return Numbers(key, scale, low, high)  # type: ignore[arg-type]  # one of the three, seen above


def _full_key(key: str, kind: str) -> str:
    """Return a recipe key, with `<kind>.x` written out as `method.x`."""
    section, dot, rest = key.partition(".")
    if section in _OTHER_LOSS:
        raise RecipeError(
            f"{key!r} cannot be varied: validation losses of trials with another {section} cannot be compared; run one "
            "sweep for each."
        )
    if not dot or section not in METHODS:
        return key
    if section != kind:
        raise RecipeError(
            f"{key!r} is a key of the method {section!r}, but the recipe's method is {kind!r}; give "
            f"'{kind}.{rest}', or --set method.kind={section}."
        )
    return f"method.{rest}"


def _choices(key: str, text: str, item: str) -> Choices:
    values = tuple(value.strip() for value in _split(text))
    if not all(values):
        raise RecipeError(f"A value is missing in {item!r}; {_SYNTAX}.")
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise RecipeError(f"{item!r} gives the value {twice!r} twice.")
    return Choices(key, values)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets, so that a list can be one choice."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _probes(one: Numbers) -> list[str]:
    """Return values that stand for a range: its ends and, unless it is of whole numbers, one between."""
    if one.scale == "int":
        return [str(int(one.low)), str(int(one.high))]
    middle = math.sqrt(one.low * one.high) if one.scale == "log" else (one.low + one.high) / 2
    between = middle if middle != int(middle) else middle + (one.high - middle) / math.pi
    return [repr(one.low), repr(one.high), repr(between)]


def _check_value(recipe: Mapping[str, Any], one: Range, text: str) -> None:
    try:
        recipe_from(recipe, [f"{one.key}={text}"])
    except RecipeError as error:
        whole = isinstance(one, Numbers) and one.scale != "int" and "integer" in str(error)
        hint = f" For whole numbers write {one.key}=int:low:high." if whole else ""
        raise RecipeError(f"{error}{hint}") from None


def _count(one: Range) -> int | None:
    if isinstance(one, Choices):
        return len(one.values)
    return int(one.high - one.low) + 1 if one.scale == "int" else None
