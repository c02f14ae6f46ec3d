"""The names a request may give: one adapter, an adapter at a strength, or a blend of several.

    support    support@2    3f9c01d2    support:0.7    support:0.4+poet:0.6

A strength is any finite number up to 10 either way; without one it is 1.
"""

import math
import re
from typing import NamedTuple

from haori.core.errors import InputError

__all__ = ["MOST_STRENGTH", "BlendPart", "parse_blend"]

MOST_STRENGTH = 10.0
_MOST_PARTS = 8
_MOST_CHARACTERS = 1200
_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_SPEC = r"(sha256:[0-9a-f]{6,64}|[A-Za-z0-9][A-Za-z0-9._-]*(@\d*)?)"
_PART = re.compile(rf"(?P<spec>{_SPEC})(:(?P<strength>{_NUMBER}))?")


class BlendPart(NamedTuple):
    """An adapter as it was asked for, and its strength."""

    spec: str
    strength: float


def parse_blend(model: str) -> tuple[BlendPart, ...]:
    """Take a model name apart.

    Raises:
        InputError: It is no name and no blend of names, or a strength is out of bounds.
    """
    parts = []
    position = 0
    is_short = len(model) <= _MOST_CHARACTERS
    while is_short and (match := _PART.match(model, position)):
        strength = float(match["strength"] or 1.0)
        check_strength(match["spec"], strength)
        parts.append(BlendPart(match["spec"], strength))
        position = match.end() + 1
        if not model.startswith("+", match.end()):
            break
    if position != len(model) + 1:
        raise InputError(
            f"{model[:120]!r} is no model name; give a name such as 'support' or 'support@2', with a strength "
            "'support:0.7', or a blend 'support:0.4+poet:0.6'."
        )
    if len(parts) > _MOST_PARTS:
        raise InputError(f"The blend {model[:120]!r} has {len(parts)} parts; at most {_MOST_PARTS} are allowed.")
    return tuple(parts)


def check_strength(spec: str, strength: float) -> None:
    """Refuse a strength that is not finite or too large.

    Raises:
        InputError: It is.
    """
    if not math.isfinite(strength) or abs(strength) > MOST_STRENGTH:
        raise InputError(
            f"The strength {strength:g} of {spec[:120]!r} is out of bounds; use a number between {-MOST_STRENGTH:g} "
            f"and {MOST_STRENGTH:g}."
        )
