"""Writes the tables of keys in docs/guide/coming-from.md from the tables that `haori import-config` works by.

`--check` writes nothing and fails when the page is old.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from haori.conversion import TOOLS
from haori.conversion.rules import Rule
from haori.conversion.training_arguments import TRAINING_ARGUMENTS

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "coming-from.md"


def table(rules: Mapping[str, Rule], title: str) -> str:
    """Return the keys that are carried over, with what they become, those to the same keys in one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for key, rule in rules.items():
        if rule.ours and "(" not in key:
            rows.setdefault(rule.ours, []).append(spelt(key))
    lines = [f"| {title} | here |", "|---|---|"]
    return "\n".join([*lines, *(f"| {', '.join(keys)} | {spelt_all(ours)} |" for ours, keys in rows.items())])


def spelt(key: str) -> str:
    """Return a key as code; one of a table of Unsloth's file with the name of the table beside it."""
    section, _, name = key.partition(".")
    return f"`{name}` (in {section})" if section in {"data", "training", "lora", "logging"} else f"`{key}`"


def spelt_all(keys: tuple[str, ...]) -> str:
    """Return keys as code."""
    return ", ".join(f"`{key}`" for key in keys)


def page(text: str) -> str:
    """Return the page with its tables as they are now."""
    tables = {name: own(tool.keys, tool.title) for name, tool in TOOLS.items()}
    tables["transformers"] = table(TRAINING_ARGUMENTS, "`TrainingArguments`")
    for name, found in tables.items():
        begin, end = f"<!-- keys of {name}: begin -->", f"<!-- keys of {name}: end -->"
        text, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{found}\n\n{end}", text, flags=re.S)  # noqa: B023
        if count != 1:
            raise SystemExit(f"{PAGE.name} has no place for the keys of {name}.")
    return text


def own(rules: Mapping[str, Rule], title: str) -> str:
    """Return a tool's table without the keys it shares with transformers."""
    return table({key: rule for key, rule in rules.items() if TRAINING_ARGUMENTS.get(key) is not rule}, title)


def main() -> None:
    """Write the page, or check it."""
    text = PAGE.read_text(encoding="utf-8")
    new = page(text)
    if "--check" in sys.argv[1:]:
        raise SystemExit(0 if new == text else 1)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
