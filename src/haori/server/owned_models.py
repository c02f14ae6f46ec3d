"""The names of one server with those of fine-tuned models, each of which its own account alone may ask for.

A `ft:` name is looked up here and stands for a name of the library from then on; what a training run saved into the
library keeps its name there. An adapter that belongs to an account is hidden from every other, whether it is asked for
by its `ft:` name, its name in the library or digits of its id.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haori.data import PromptFormat
from haori.jobs.model_names import PREFIX, ModelName, ModelNames
from haori.serve.adapters.directory import CheckAdapter
from haori.serve.request import AdapterMix
from haori.server.contracts import Directory, ModelEntry, Resolved

__all__ = ["OwnedDirectory", "name_and_strength"]

_STRENGTH = re.compile(r"(?P<name>ft:.*?)(?P<strength>:[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)?")


@dataclass(frozen=True)
class _Entry:
    id: str
    created_unix_s: int
    root: Path | None
    parent: str | None
    adapter: str | None


class OwnedDirectory:
    """A directory, and the names that accounts have besides.

    Args:
        directory: The names of everybody.
        names: Those of accounts.
    """

    def __init__(self, directory: Directory, names: ModelNames) -> None:
        self.directory, self.names = directory, names

    def resolve(self, model: str) -> Resolved:
        """Say what a name without `ft:` means; whose it is, `claims` tells."""
        return self.directory.resolve(model)

    def translated(self, model: str, account: str | None) -> str:
        """Return a model name with each `ft:` name in it replaced by the adapter's name in the library.

        Args:
            model: A name or a blend.
            account: Who asks; None for anybody.

        Raises:
            ModelMissingError: One means nothing, or belongs to another account.
        """
        if PREFIX not in model:
            return model
        parts = []
        for part in model.split("+"):
            name, strength = name_and_strength(part)
            parts.append((self.names.find(name, account).library_name if part.startswith(PREFIX) else name) + strength)
        return "+".join(parts)

    def claims(self, resolved: Resolved) -> Sequence[Sequence[ModelName]]:
        """Return, for each adapter that a name means, who has it; for one that is everybody's, nobody."""
        ids = [adapter for adapter, _ in resolved.mix]
        held = self.names.claims(ids, [name for names in resolved.full_names for name in names])
        by_id = [[row for row in held if row.adapter == adapter] for adapter in ids]
        return [*by_id, *(_named(held, names) for names in resolved.full_names)]

    def claims_of(self, full_names: Sequence[str]) -> Sequence[ModelName]:
        """Return who has one adapter, given the names that it has in the library."""
        return _named(self.names.claims([], full_names), full_names)

    def entries(self) -> Sequence[ModelEntry]:
        """Return what everybody may ask for."""
        return self.entries_of("")

    def entries_of(self, account: str | None) -> Sequence[ModelEntry]:
        """Return what an account may ask for, or with None what any may."""
        rows = self.names.all()
        ids = {row.adapter for row in rows}
        names = {row.library_name.partition("@")[0] for row in rows}
        saved = {row.name for row in rows if row.name == row.library_name and account in (None, row.owner)}
        found: list[ModelEntry] = []
        folders: dict[str, ModelEntry] = {}
        for entry in self.directory.entries():
            name = entry.id.partition("@")[0]
            if entry.adapter in ids or (entry.adapter and name in names and name not in saved):
                folders[str(entry.adapter)] = entry
            else:
                found.append(entry)
        for row in self.names.list(account):
            if held := folders.get(row.adapter):  # of this base, and not removed from the library
                found.append(_Entry(row.name, int(row.created), held.root, held.parent, row.adapter))
        return found

    def prompt_format(self, tokenizer: Any, mix: AdapterMix) -> PromptFormat:
        """Return how the adapters of a mix are spoken to."""
        return self.directory.prompt_format(tokenizer, mix)

    def register(self, name: str, folder: str | Path, check: CheckAdapter, *, replace: bool = False) -> None:
        """Give an adapter a name for everybody."""
        self.directory.register(name, folder, check, replace=replace)

    def unregister(self, name: str) -> None:
        """Take such a name away."""
        self.directory.unregister(name)


def _named(rows: Sequence[ModelName], full_names: Sequence[str]) -> Sequence[ModelName]:
    known = {*full_names, *(name.partition("@")[0] for name in full_names)}
    return [row for row in rows if row.library_name in known]


def name_and_strength(part: str) -> tuple[str, str]:
    """Take the strength off a part of a blend that is a `ft:` name; the id in one is no number, so that it is plain."""
    found = _STRENGTH.fullmatch(part)
    return (part, "") if found is None else (found["name"], found["strength"] or "")
