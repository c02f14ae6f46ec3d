"""The licence that a folder of data states: in the front matter of its card, as the hub shows it."""

from pathlib import Path
from typing import Any

import yaml

from haori.data.splits import FRONT_MATTER

__all__ = ["card_licence"]

_LIMIT_BYTES = 4 << 20


def card_licence(folder: Path) -> str | None:
    """Return what `license` says in the README.md of a folder; None where nothing does."""
    try:
        with (folder / "README.md").open("rb") as file:
            front = FRONT_MATTER.match(file.read(_LIMIT_BYTES).decode("utf-8", "replace"))
        facts: Any = yaml.safe_load(front[1]) if front is not None else None
    except (OSError, yaml.YAMLError):
        return None
    licence = facts.get("license") if isinstance(facts, dict) else None
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    return licence.strip() or None if isinstance(licence, str) else None
