"""Gives module names their dots back that a format has turned into underscores.

`down_blocks_0_attentions_1_proj_in` may only be `down_blocks.0.attentions.1.proj_in`, since the base has modules called
`down_blocks` and `proj_in`, and none called `down` or `in`.
"""

from collections.abc import Set as AbstractSet

__all__ = ["dotted", "underscored"]

_MOST_WORDS = 5


def dotted(name: str, words: AbstractSet[str]) -> str | None:
    """Split a name into words of the base, the longest that fits first, and numbers; None if a part is neither.

    Args:
        name: With underscores, dots or both.
        words: What modules of the base are called, such as `down_blocks`; digits need not be among them.
    """
    parts = name.replace(".", "_").split("_")
    found: list[str] = []
    place = 0
    while place < len(parts):
        for count in range(min(_MOST_WORDS, len(parts) - place), 0, -1):
            word = "_".join(parts[place : place + count])
            if word in words or word.isdecimal():
                found.append(word)
                place += count
                break
        else:
            return None
    return ".".join(found)


def underscored(name: str) -> str:
    """Return a module's name with underscores for dots."""
    return name.replace(".", "_")
