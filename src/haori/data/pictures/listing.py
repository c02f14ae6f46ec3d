"""What a source of pictures lists, whatever its layout: files with what it says of each, before any is opened."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from haori.core.errors import DataError
from haori.data.pictures.row import Augmentation

__all__ = ["Listing", "PictureFile", "picture_origin"]


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A file and what its source says of it.

    Attributes:
        origin: What people call it.
        file: Where it is.
        caption: Reads its caption, or returns None where it has none of its own; it may raise a `DataError`.
        fallback: Caption to take in that case, as the name of a folder may give; None if there is none.
        mask: A mask file that was found for it.
        repeats: How often it comes in an epoch.
        weight: Factor of its loss.
        prior: Whether it is a regularisation picture.
        augmentation: What is drawn anew each time, where the source says so itself.
    """

    origin: str
    file: Path
    caption: Callable[[], str | None]
    fallback: str | None = None
    mask: Path | None = None
    repeats: int = 1
    weight: float = 1.0
    prior: bool = False
    augmentation: Augmentation | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """What was found.

    Attributes:
        layout: Its name for people: folder, metadata.jsonl, kohya dataset.
        files: The pictures, in a fixed order.
        ignored: Files that are neither pictures nor anything about them.
        notes: What a user should know, as sentences.
        problems: What is wrong without belonging to a picture that is listed.
        licence: What the source says of its own licence.
    """

    layout: str
    files: list[PictureFile]
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)
    licence: str | None = None


def picture_origin(given: str, folder: Path, path: Path) -> str:
    """Return what people call a file of a folder that was given as `given`."""
    return str(Path(given) / path.relative_to(folder))
