"""A recipe in the making: what was carried from another tool's file, what was left, and facts not yet combined.

Every key that is read ends in exactly one entry; a fact that nobody combined is left, so that nothing is lost.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from haori.conversion.rules import Carried, Fact, Left, Outcome, Unneeded

__all__ = ["Draft", "Entry"]


@dataclass(frozen=True)
class Entry:
    """What became of one key.

    Attributes:
        key: As the other tool spells it, with the tables and lists around it.
        outcome: What became of it.
        assumed: The file is silent, and this is that tool's own default.
    """

    key: str
    outcome: Carried | Left | Unneeded
    assumed: bool = False


@dataclass(frozen=True)
class _Noted:
    key: str
    value: Any
    assumed: bool


class Draft:
    """What is known of the recipe so far.

    Attributes:
        entries: What became of each key, in the order of the file.
        ours: Values of the recipe by dotted key.
        origin: The key of the file that each of them comes from.
        no_data: Why the data that the file names cannot be found.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.ours: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.no_data = ""
        self._facts: dict[str, _Noted] = {}

    def add(self, key: str, outcome: Outcome, *, assumed: bool = False) -> None:
        """Take what a rule said of a key; the first key that says something counts."""
        if isinstance(outcome, Fact):
            held = self._facts.get(outcome.name)
            if held is None:
                self._facts[outcome.name] = _Noted(key, outcome.value, assumed)
            elif not assumed:
                self._second(key, held.key, agrees=held.value == outcome.value)
            return
        if isinstance(outcome, Carried):
            if taken := next((name for name in outcome.ours if name in self.ours), None):
                if not assumed:
                    self._second(key, self.origin[taken], agrees=self.ours[taken] == outcome.ours[taken])
                return
            self.ours |= outcome.ours
            self.origin |= dict.fromkeys(outcome.ours, key)
        keys = outcome.of or (key,) if isinstance(outcome, Carried) else (key,)
        self.entries += [Entry(name, outcome, assumed) for name in keys]

    def _second(self, key: str, first: str, *, agrees: bool) -> None:
        outcome = Unneeded(f"{first!r} says the same") if agrees else Left(f"{first!r} says another, and comes first")
        self.entries.append(Entry(key, outcome))

    def has(self, name: str) -> bool:
        """Say whether a fact is noted."""
        return name in self._facts

    def value(self, name: str, default: Any = None) -> Any:
        """Return a fact's value."""
        return self._facts[name].value if name in self._facts else default

    def key(self, name: str) -> str:
        """Return the key of the file that a fact comes from."""
        return self._facts[name].key

    def is_assumed(self, name: str) -> bool:
        """Say whether a fact is the tool's default."""
        return self._facts[name].assumed

    def carry(self, names: str | Iterable[str], ours: Mapping[str, Any], remark: str = "") -> None:
        """Carry facts to keys of the recipe; those that are not noted are passed over."""
        chosen = [names] if isinstance(names, str) else list(names)
        noted = [self._facts.pop(name) for name in chosen if name in self._facts]
        self.ours |= ours
        for position, fact in enumerate(noted):
            self.origin |= {name: fact.key for name in ours if position == 0 or name not in self.origin}
            self.entries.append(Entry(fact.key, Carried(ours, remark if position == 0 else ""), fact.assumed))

    def leave(self, name: str, reason: str, instead: str = "") -> None:
        """Leave a fact, if it is noted; a default that cannot be carried is left like any other."""
        if name in self._facts:
            fact = self._facts.pop(name)
            self.entries.append(Entry(fact.key, Left(reason, instead), fact.assumed))

    def unneeded(self, name: str, reason: str) -> None:
        """Drop a fact that needs nothing, if it is noted."""
        if name in self._facts:
            fact = self._facts.pop(name)
            if not fact.assumed:
                self.entries.append(Entry(fact.key, Unneeded(reason)))

    def forget(self, key: str, values: Container[Any], reason: str) -> None:
        """Take back a key of the recipe that was carried with one of `values`."""
        if self.ours.get(key) in values:
            self.take_back(lambda name: name == key, lambda _: reason)

    def take_back(self, is_foreign: Callable[[str], bool], reason: Callable[[str], str]) -> None:
        """Leave what was carried to keys that the recipe does not have; defaults of the tool go without a word."""
        kept: list[Entry] = []
        for entry in self.entries:
            found = [key for key in entry.outcome.ours if is_foreign(key)] if isinstance(entry.outcome, Carried) else []
            if not found:
                kept.append(entry)
                continue
            assert isinstance(entry.outcome, Carried)
            for key in found:
                self.ours.pop(key, None)
                self.origin.pop(key, None)
            rest = {key: value for key, value in entry.outcome.ours.items() if key not in found}
            if rest:
                kept.append(replace(entry, outcome=replace(entry.outcome, ours=rest)))
            elif not entry.assumed:
                kept.append(replace(entry, outcome=Left(reason(found[0]))))
        self.entries[:] = kept

    def finish(self) -> None:
        """Leave the facts that nobody asked for."""
        for name in list(self._facts):
            self.leave(name, "nothing else in the file makes use of it")
