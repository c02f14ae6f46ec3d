"""What is known of a training tool: its keys, how its files are told from others', its own defaults."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haori.conversion.draft import Draft
from haori.conversion.rules import Rule

__all__ = ["Tool"]


def _no_defaults(_: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _unchanged(document: dict[str, Any], _: Path) -> dict[str, Any]:
    return document


def _no_data(_: Draft) -> None:
    return None


@dataclass(frozen=True)
class Tool:
    """A training tool.

    Attributes:
        name: As `--tool` takes it.
        title: As its authors write it.
        command: How a run is started there; `{file}` stands for the configuration.
        keys: What becomes of each key; keys of a table within are written `table.key`, those of a list `list[].key`.
        signs: Keys that only this tool, or hardly another, has.
        defaults: Its own values, by its own keys, where they differ from ours and change what is learnt.
        habits: What it does that no key of it says, by our keys, each with the sentence for it.
        prepare: Adds what the file refers to, such as the description of a dataset beside it.
        combine_data: Settles the facts about data that its rules note.
    """

    name: str
    title: str
    command: str
    keys: Mapping[str, Rule]
    signs: frozenset[str]
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=_no_defaults)
    habits: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    prepare: Callable[[dict[str, Any], Path], dict[str, Any]] = field(default=_unchanged)
    combine_data: Callable[[Draft], None] = field(default=_no_data)
