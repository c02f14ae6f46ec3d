"""What is said of an adapter beside its weights: by its user, its model card, the site it came from, its header."""

from dataclasses import dataclass, fields
from typing import Any

from haori.core.records import Permissions

__all__ = ["Stated"]


@dataclass(frozen=True)
class Stated:
    """Claims about an adapter, kept on its card as such; what is empty is not said.

    Attributes:
        licence: The terms its author gives it: an SPDX id or expression.
        description: What it is for.
        trigger_words: Words that call up in a prompt what was learnt.
        tags: Of a model card or a site.
        stated_bases: Bases that it is said to be made for; it is proved on the one given, or on none.
        downloaded_from: Where the files came from.
        permissions: What its author permits, as Civitai asks it.
    """

    licence: str | None = None
    description: str | None = None
    trigger_words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    stated_bases: tuple[str, ...] = ()
    downloaded_from: str | None = None
    permissions: Permissions | None = None

    def before(self, other: "Stated") -> "Stated":
        """Return these claims, and those of `other` where nothing is said here."""
        return Stated(**{**other.card_fields(), **self.card_fields()})

    def card_fields(self) -> dict[str, Any]:
        """Return what is said, as fields of a card."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}
