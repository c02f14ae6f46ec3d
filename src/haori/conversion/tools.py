"""The tools whose configurations can be converted, and how a file shows which of them wrote it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haori.conversion.axolotl import AXOLOTL
from haori.conversion.llama_factory import LLAMA_FACTORY
from haori.conversion.ms_swift import MS_SWIFT
from haori.conversion.peft_config import PEFT
from haori.conversion.tool import Tool
from haori.conversion.training_arguments import TRAINING_ARGUMENTS
from haori.conversion.trl import TRL
from haori.conversion.unsloth import UNSLOTH
from haori.core.errors import RecipeError

__all__ = ["TOOLS", "detect_tool"]

TOOLS: Mapping[str, Tool] = {tool.name: tool for tool in (AXOLOTL, LLAMA_FACTORY, TRL, PEFT, UNSLOTH, MS_SWIFT)}

_ENOUGH = 3
"""Arguments of a Trainer that tell them from a file of another kind."""


def detect_tool(document: Mapping[str, Any], path: Path) -> Tool:
    """Return the tool of which a file has most keys that hardly another has.

    Raises:
        RecipeError: No tool is known by these keys, or several equally well.
    """
    counted = {tool.name: len(tool.signs & document.keys()) for tool in TOOLS.values()}
    if not any(counted.values()) and len(TRAINING_ARGUMENTS.keys() & document.keys()) >= _ENOUGH:
        return TRL
    most = max(counted.values())
    found = [name for name, count in counted.items() if count == most]
    if not most:
        keys = ", ".join(repr(key) for key in list(document)[:8])
        raise RecipeError(
            f"{str(path)!r} has the keys {keys}, by which no tool is known; say which wrote it with --tool, one of "
            f"{', '.join(TOOLS)}."
        )
    if len(found) > 1:
        raise RecipeError(f"{str(path)!r} could be of {' or '.join(found)}; say which with --tool.")
    return TOOLS[found[0]]
