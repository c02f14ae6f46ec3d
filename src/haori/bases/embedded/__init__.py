"""Bases that are part of Haori: whole model folders beside this file, there without a download."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["EMBEDDED", "EmbeddedBase", "usual_guidance"]


@dataclass(frozen=True)
class EmbeddedBase:
    """A base in a folder of the package; its card says what it is and what it was made from.

    Attributes:
        name: Its name here, and of its folder.
        licence: SPDX expression over the weights and what they were trained on.
        description: One line for the list.
        guidance: Strength of the prompt at which it draws best.
    """

    name: str
    licence: str
    description: str
    guidance: float

    @property
    def folder(self) -> Path:
        """Return the model folder."""
        return Path(__file__).parent / self.name

    @property
    def source(self) -> str:
        """Return the source as a base's record holds it."""
        return f"embedded:{self.name}"


_EMOJI_SD = EmbeddedBase(
    name="emoji-sd",
    licence="Apache-2.0 AND MIT AND CC-BY-4.0",
    description="emoji-sd: emoji of 64 x 64 pixels from their names (Stable Diffusion's shape, for trying pictures)",
    guidance=3.0,
)

EMBEDDED: Mapping[str, EmbeddedBase] = {entry.name: entry for entry in (_EMOJI_SD,)}


def usual_guidance(source: str) -> float | None:
    """Return the guidance scale for a base by its source where nothing else is asked for; None for the pipeline's."""
    return next((entry.guidance for entry in EMBEDDED.values() if entry.source == source), None)
