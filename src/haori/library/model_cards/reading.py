"""What an author's model card says of an adapter: the front matter of the README.md beside its files.

It is a claim, kept as such: the licence counts as the author's, and the base is the one that the adapter was proved on.
"""

from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ModelCard", "read_model_card"]

_MOST = 100


class ModelCard(NamedTuple):
    """What a model card states.

    Attributes:
        licence: SPDX expression of `license`, or of a LICENSE file beside it.
        bases: The bases it names in `base_model`.
        tags: Its `tags`.
    """

    licence: str | None
    bases: tuple[str, ...]
    tags: tuple[str, ...]


def read_model_card(folder: Path) -> ModelCard:
    """Read the model card in an adapter's folder; empty where there is none, or none that can be read."""
    from haori.bases.licence import front_matter, licence_of_folder

    table = front_matter(folder / "README.md")
    return ModelCard(licence_of_folder(folder), _texts(table.get("base_model")), _texts(table.get("tags")))


def _texts(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    texts = (" ".join(text.split())[:_MOST] for text in found[:_MOST] if isinstance(text, str))
    return tuple(dict.fromkeys(text for text in texts if text))
