"""Converts the configuration of another tool into a recipe, and tells what became of each of its keys."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haori.conversion.draft import Draft, Entry
from haori.conversion.method import combine_method, combine_precision, drop_foreign_keys
from haori.conversion.origin import combine_origin
from haori.conversion.reading import holds_secret, is_empty, read_document
from haori.conversion.rules import Carried, Left, Rule, Unneeded
from haori.conversion.steps import combine_batches, combine_measuring, combine_run_length
from haori.conversion.task import choose_task, combine_loss, known_keys
from haori.conversion.tool import Tool
from haori.conversion.tools import TOOLS, detect_tool
from haori.conversion.values import UnfitValueError
from haori.core.errors import RecipeError, nearest
from haori.tasks.recipe import Recipe, recipe_from

__all__ = ["Conversion", "import_config", "printable"]

_QUANTISED_COPY = re.compile(r"(-unsloth)?-bnb-4bit$", re.IGNORECASE)
_ONE_ENTRY = "a recipe reads one file, folder or dataset"
_ENVIRONMENT = "give it by its environment variable, as HF_TOKEN"
_PUT_TOGETHER = "put the files into one folder, and name the folder in data.path"


@dataclass(frozen=True)
class Conversion:
    """A recipe out of another tool's configuration.

    Attributes:
        tool: The tool.
        document: The recipe as plain data, with nothing in it that was not said.
        recipe: The same, checked.
        entries: What became of each key of the file, and of the tool's own defaults.
    """

    tool: Tool
    document: dict[str, Any]
    recipe: Recipe
    entries: tuple[Entry, ...]

    def carried(self) -> list[tuple[str, str]]:
        """Return keys of the file with the keys of the recipe they became."""
        return [(printable(entry.key), _became(entry.outcome)) for entry in self.entries
                if isinstance(entry.outcome, Carried) and not entry.assumed]  # fmt: skip

    def assumed(self) -> list[tuple[str, str]]:
        """Return what the file leaves to its tool, and the recipe says."""
        return [(entry.key, _became(entry.outcome)) for entry in self.entries
                if isinstance(entry.outcome, Carried) and entry.assumed]  # fmt: skip

    def left(self) -> list[tuple[str, str]]:
        """Return keys that are not carried over, with the reason and what to do instead."""
        return [(printable(entry.key), _why(entry)) for entry in self.entries if isinstance(entry.outcome, Left)]

    def unneeded(self) -> list[tuple[str, list[str]]]:
        """Return keys that need nothing, by the reason."""
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            if isinstance(entry.outcome, Unneeded):
                found.setdefault(entry.outcome.reason, []).append(printable(entry.key))
        return list(found.items())


def import_config(
    path: Path, tool: str | None = None, *, base: str | None = None, data: str | None = None, name: str | None = None
) -> Conversion:
    """Convert a configuration file.

    Args:
        path: The file, in YAML or JSON.
        tool: One of `TOOLS`; found by the keys of the file if not given.
        base: Base of the recipe, in place of the one in the file.
        data: Data of the recipe, in place of the one in the file.
        name: Name of the adapter; by default, that of the file.

    Raises:
        RecipeError: The file cannot be read, no tool or several have these keys, a value cannot be, or what is left
            is no recipe.
    """
    document = read_document(path)
    found = _tool(tool, document, path)
    document = found.prepare(document, path)
    draft = Draft()
    _apply(found, document, draft, path)
    defaults = {key: value for key, value in found.defaults(document).items() if not _is_said(document, key)}
    _apply(found, defaults, draft, path, assumed=True)
    for key, (value, habit) in found.habits.items():
        draft.add(f"({habit})", Carried({key: value}), assumed=True)
    task = choose_task(draft, path)
    _given(draft, base, data)
    combine_method(draft)
    combine_origin(draft)
    combine_precision(draft)
    combine_batches(draft)
    combine_run_length(draft)
    combine_measuring(draft)
    found.combine_data(draft)
    combine_loss(draft, task)
    _identify(draft, path, name)
    drop_foreign_keys(draft, known_keys(task))
    draft.finish()
    plain = _nested(draft.ours)
    try:
        recipe = recipe_from(plain)
    except RecipeError as error:
        raise RecipeError(_with_origin(str(error), draft, path)) from None
    return Conversion(found, plain, recipe, tuple(draft.entries))


def _became(outcome: Carried) -> str:
    ours = ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in outcome.ours.items())
    return printable(f"{ours} ({outcome.remark})" if outcome.remark else ours)


def printable(text: str) -> str:
    """Return text of a file as one line, without what a terminal or a comment would take for a command."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _why(entry: Entry) -> str:
    assert isinstance(entry.outcome, Left)
    by_itself = "(not in the file) " if entry.assumed else ""
    nearest_here = f"; instead: {entry.outcome.instead}" if entry.outcome.instead else ""
    return printable(f"{by_itself}{entry.outcome.reason}{nearest_here}")


def _tool(given: str | None, document: Mapping[str, Any], path: Path) -> Tool:
    if given is None:
        return detect_tool(document, path)
    if given not in TOOLS:
        hint = nearest(given, TOOLS)
        raise RecipeError(
            f"There is no tool {given!r}; --tool is one of {', '.join(TOOLS)}{'; ' if hint else '.'}{hint}"
        )
    return TOOLS[given]


def _apply(tool: Tool, document: Mapping[str, Any], draft: Draft, path: Path, *, assumed: bool = False) -> None:
    for key, value in _keys(tool.keys, document):
        rule = tool.keys.get(_pattern(key))
        if holds_secret(value):
            draft.add(key, Left(f"a secret, which is not copied{_inside(value)}", _ENVIRONMENT))
        elif _is_later(key):
            draft.add(key, Left(f"{_ONE_ENTRY}{_inside(value)}", _PUT_TOGETHER))
        elif rule is None:
            draft.add(key, _unknown(tool, key, value))
        else:
            _one(rule, key, value, draft, path, assumed=assumed)


def _one(rule: Rule, key: str, value: Any, draft: Draft, path: Path, *, assumed: bool) -> None:
    try:
        outcome = rule.apply(value)
    except UnfitValueError as error:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise RecipeError(f"In {str(path)!r}, {key!r} cannot be {shown}; it should {error}.") from None
    if isinstance(outcome, Left) and isinstance(value, dict):
        outcome = Left(f"{outcome.reason}{_inside(value)}", outcome.instead)
    draft.add(key, outcome, assumed=assumed)


def _inside(value: Any) -> str:
    return f" (with {', '.join(value)})" if isinstance(value, dict) else ""


def _keys(rules: Mapping[str, Rule], document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys with what they hold, down to the depth that rules know; empty ones are as good as absent."""
    for name, value in document.items():
        key = f"{prefix}{name}"
        rule = rules.get(_pattern(key))
        if rule is not None and rule.takes_null and value is None:
            yield key, value
        elif is_empty(value):
            continue
        elif isinstance(value, dict) and _holds(rules, f"{key}."):
            yield from _keys(rules, value, f"{key}.")
        elif rule is not None:
            yield key, value
        elif isinstance(value, list) and _holds(rules, f"{key}[]"):
            first = value[0]
            yield from _keys(rules, first, f"{key}[0].") if isinstance(first, dict) else iter([(f"{key}[0]", first)])
            yield from ((f"{key}[{number}]", entry) for number, entry in enumerate(value[1:], start=1))
        else:
            yield key, value


def _is_said(document: Mapping[str, Any], key: str) -> bool:
    table, _, last = key.rpartition(".")
    place = document.get(table, {}) if table else document
    return isinstance(place, dict) and not is_empty(place.get(last))


def _pattern(key: str) -> str:
    return re.sub(r"\[\d+\]", "[]", key)


def _is_later(key: str) -> bool:
    return re.search(r"\[[1-9]\d*\]", key) is not None


def _holds(rules: Mapping[str, Rule], prefix: str) -> bool:
    return any(key.startswith(_pattern(prefix)) for key in rules)


def _unknown(tool: Tool, key: str, value: Any) -> Left:
    hint = nearest(_pattern(key), tool.keys, limit=1)
    return Left(f"no key of {tool.title} that is known here{_inside(value)}", hint)


def _given(draft: Draft, base: str | None, data: str | None) -> None:
    """Put what the options say in place of what the file says."""
    for names, key, given in ((("base",), "base", base), (("data", "files"), "data.path", data)):
        if given is not None:
            draft.ours[key] = given
            for fact in names:
                draft.unneeded(fact, f"--{names[0]} says another")


def _identify(draft: Draft, path: Path, name: str | None) -> None:
    """Settle base, data and name."""
    for fact, key, what in (("base", "base", "base model"), ("data", "data.path", "data")):
        if draft.has(fact):
            found = draft.value(fact)
            sixteen = _QUANTISED_COPY.sub("", found) if fact == "base" else found
            remark = "the copy in 16 bits, since files in 4 bits are not trained on" if sixteen != found else ""
            draft.carry(fact, {key: sixteen}, remark)
        elif key not in draft.ours:
            why = draft.no_data if fact == "data" else ""
            raise RecipeError(
                f"{str(path)!r} names no {what}{why and f' that can be found: {why}'}; say which with --{fact}."
            )
    if name is None:
        stem = path.parent.name if path.stem in {"adapter_config", "args", "config", "training_args"} else path.stem
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem or path.stem).strip("._-")[:100]
        if not name:
            raise RecipeError(f"No name of an adapter can be made of {path.name!r}; give one with --name.")
    draft.ours["name"] = name


def _nested(ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as tables, in the order of a recipe."""
    order = ("name", "base", "revision", "task", "from", "data", "method", "loss", "optimizer", "schedule", "training")
    found: dict[str, Any] = {name: {} for name in order}
    for key, value in ours.items():
        *parents, last = key.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    found["method"] = dict(sorted(found["method"].items(), key=lambda item: item[0] != "kind"))
    return {name: value for name, value in found.items() if value != {}}


def _with_origin(message: str, draft: Draft, path: Path) -> str:
    """Say of which key of the file a message about a recipe speaks."""
    spoken = re.search(r"'([a-z_]+(?:\.[a-z_]+)*)'", message)
    origin = draft.origin.get(spoken[1]) if spoken else None
    return f"{message} That comes from {origin!r} in {str(path)!r}." if origin else f"{message} (from {str(path)!r})"
