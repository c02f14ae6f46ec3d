"""What the `model` of a request for pictures means: the base, an adapter of it, or a blend, as tags in the prompt."""

import re

from haori.core.errors import InputError
from haori.images.tags import MAX_STRENGTH

__all__ = ["tags_of"]

_MOST_CHARACTERS = 1200
_MOST_PARTS = 8
_PART = re.compile(r"(?P<name>[^<>:+\s][^<>:+]*)(?::(?P<strength>[-+]?(?:\d+\.?\d*|\.\d+)))?", re.ASCII)


def tags_of(model: str, base: str) -> str:
    """Return the tags that a model name stands for; empty for the base.

    Args:
        model: `emoji-sd`, `lineart`, `lineart:0.7`, `lineart:0.4+ink:0.6`, or with the base in front.
        base: Name of the base.

    Raises:
        InputError: It is no such name, or a strength is out of bounds.
    """
    parts = model.split("+") if len(model) <= _MOST_CHARACTERS else []
    if parts and parts[0] == base:
        parts = parts[1:]
        if not parts:
            return ""
    read = [_PART.fullmatch(part) for part in parts]
    if not 0 < len(parts) <= _MOST_PARTS or not all(read):
        raise InputError(
            f"{model[:120]!r} is no model name; give {base!r}, an adapter such as 'lineart', with a strength "
            f"'lineart:0.7', or a blend of at most {_MOST_PARTS}, 'lineart:0.4+ink:0.6'."
        )
    tags = []
    for part in filter(None, read):
        strength = float(part["strength"] or 1.0)
        if part["name"] == base or abs(strength) > MAX_STRENGTH:
            raise InputError(
                f"The base {base!r} stands in front of a blend, without a strength, or is left out."
                if part["name"] == base
                else f"The strength {strength:g} of {part['name'][:120]!r} is out of bounds; {MAX_STRENGTH:g} is most."
            )
        tags.append(f"<lora:{part['name']}:{part['strength'] or 1}>")
    return "".join(tags)
