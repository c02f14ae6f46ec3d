"""What a source of pictures lists, whatever its layout: files with what it says of each, before any is opened."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from haori.core.errors import DataError
from haori.data.pictures.section import PictureSection

__all__ = ["Listing", "PictureFile", "listed", "picture_origin"]


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A file and what its source says of it.

    Attributes:
        origin: What people call it.
        file: Where it is.
        caption: Reads its caption, or returns None where it has none of its own; it may raise a `DataError`.
        section: How it is treated: the recipe's section, with what its source says itself in place of that.
        fallback: Caption to take in that case, as the name of a folder may give; None if there is none.
        mask: A mask file that was found for it.
        repeats: How often it comes in an epoch, before the section's repeats.
        weight: Factor of its loss.
        prior: Whether it is a regularisation picture.
        held_out: Whether its source keeps it for validation.
    """

    origin: str
    file: Path
    caption: Callable[[], str | None]
    section: PictureSection
    fallback: str | None = None
    mask: Path | None = None
    repeats: int = 1
    weight: float = 1.0
    prior: bool = False
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """What was found.

    Attributes:
        layout: Its name for people: folder, metadata.jsonl, kohya dataset.
        files: The pictures, in a fixed order.
        ignored: Files that are neither pictures nor anything about them.
        notes: What a user should know, as sentences.
        problems: What is wrong without belonging to a picture that is listed.
        licences: What the source says of its own licences.
    """

    layout: str
    files: list[PictureFile]
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)
    licences: list[str] = field(default_factory=list)


def picture_origin(given: str, folder: Path, path: Path) -> str:
    """Return what people call a file of a folder that was given as `given`."""
    return str(Path(given) / path.relative_to(folder))


def listed(names: list[str], most: int = 5) -> str:
    """Return the first names, with how many there are where that is more."""
    return ", ".join(names[:most]) + (f" ... ({len(names):,} in all)" if len(names) > most else "")
