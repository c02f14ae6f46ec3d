"""The language that the tables of tools are written in: what becomes of one key of another tool.

A rule takes the value of a key and says what becomes of it: `Carried` into keys of a recipe, `Left` with the reason,
or `Unneeded` since nothing has to be done. What only several keys say together (the rows of a batch, the kind of
method) is a `Fact`: it is noted, and combined when all keys are read. Knows nothing about any tool or file.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from haori.conversion.values import plain

__all__ = [
    "Carried",
    "Fact",
    "Left",
    "Outcome",
    "Rule",
    "Unneeded",
    "choice",
    "fact",
    "group",
    "lacks",
    "of_the_tool",
    "same",
    "same_if",
    "to",
]

_NO_EFFECT = "nothing here to switch off"


@dataclass(frozen=True)
class Carried:
    """Keys of a recipe with their values, and what a reader should know about the change.

    Attributes:
        of: The keys of the file, where they are not the one that the rule was asked about.
    """

    ours: Mapping[str, Any]
    remark: str = ""
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """Why a key is not carried over, and the nearest thing to do here."""

    reason: str
    instead: str = ""


@dataclass(frozen=True)
class Unneeded:
    """Why a key needs nothing to be carried."""

    reason: str


@dataclass(frozen=True)
class Fact:
    """A value that is combined with those of other keys."""

    name: str
    value: Any


Outcome = Carried | Left | Unneeded | Fact


@dataclass(frozen=True)
class Rule:
    """What becomes of a key.

    Attributes:
        apply: Its value to an outcome; raises UnfitValueError where it cannot be.
        ours: The keys of a recipe that it is carried to, for the documentation; empty where it is not.
        takes_null: A key without a value says something; elsewhere it is as good as absent.
    """

    apply: Callable[[Any], Outcome]
    ours: tuple[str, ...] = ()
    takes_null: bool = False


def to(key: str, read: Callable[[Any], Any] = plain, remark: str = "") -> Rule:
    """Carry a value to `key`, as `read` makes of it."""
    return Rule(lambda value: Carried({key: read(value)}, remark), (key,))


def choice(key: str, values: Mapping[Any, Any], otherwise: str, instead: str = "") -> Rule:
    """Carry a value by a table of spellings; others are left with `otherwise`, which may hold `{value}`."""
    table = {_spelt(theirs): ours for theirs, ours in values.items()}

    def apply(value: Any) -> Outcome:
        if _spelt(value) in table:
            return Carried({key: table[_spelt(value)]})
        return Left(otherwise.format(value=repr(value)), instead)

    return Rule(apply, (key,))


def fact(name: str, *ours: str, read: Callable[[Any], Any] = plain, takes_null: bool = False) -> Rule:
    """Note a value under `name`, to be combined with others into the keys `ours`."""
    return Rule(lambda value: Fact(name, read(value)), ours, takes_null)


def lacks(reason: str, instead: str = "", off: Iterable[Any] = (False, 0)) -> Rule:
    """Leave a key for which there is nothing here; a value of `off` asks for nothing."""
    unset = [_spelt(value) for value in off]
    return Rule(lambda value: Unneeded(_NO_EFFECT) if _spelt(value) in unset else Left(reason, instead))


def same(reason: str) -> Rule:
    """Take a key that needs nothing to be done here, whatever its value."""
    return Rule(lambda _: Unneeded(reason))


def same_if(values: Iterable[Any], reason: str, otherwise: str, instead: str = "") -> Rule:
    """Take a key that needs nothing to be done for `values`; others are left."""
    known = [_spelt(value) for value in values]

    def apply(value: Any) -> Outcome:
        return Unneeded(reason) if _spelt(value) in known else Left(otherwise.format(value=repr(value)), instead)

    return Rule(apply)


def group(rule: Rule, *keys: str) -> dict[str, Rule]:
    """Return a table in which one rule stands for several keys."""
    return dict.fromkeys(keys, rule)


def of_the_tool(*keys: str) -> dict[str, Rule]:
    """Return a table of keys that steer the other tool's own machinery and nothing that is learnt."""
    return group(same("about that tool's own machinery, not about what is learnt"), *keys)


def _spelt(value: Any) -> str:
    return str(value).strip().lower()
