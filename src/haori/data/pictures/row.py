"""One picture of a dataset as it is trained on: its file, caption, bucket and crop. Frozen, and without pixels."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from haori.data.pictures.section import PictureSection

__all__ = ["ALPHA", "Augmentation", "Crop", "Mask", "PictureRow"]

ALPHA: Literal["alpha"] = "alpha"
Mask: TypeAlias = Path | Literal["alpha"]


@dataclass(frozen=True, slots=True)
class Crop:
    """What of an upright picture is seen: it is scaled to `scaled`, and a bucket is cut out at `left`, `top`.

    All in pixels, sizes as (width, height).
    """

    scaled: tuple[int, int]
    left: int
    top: int

    def mirrored(self, bucket: tuple[int, int]) -> "Crop":
        """Return the crop of the mirrored picture that shows the same part."""
        return Crop(self.scaled, self.scaled[0] - self.left - bucket[0], self.top)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is drawn anew each time a picture is trained on; keys as in `PictureSection`."""

    crop: Literal["centre", "random", "smart"] = "centre"
    flip: bool = False
    colour: float = 0.0
    trigger: str | None = None
    caption_dropout: float = 0.0
    shuffle_caption: bool = False
    keep_tokens: int = 0
    caption_separator: str = ","

    @classmethod
    def of(cls, section: "PictureSection") -> "Augmentation":
        """Return what the section says of all pictures."""
        return cls(**{name: getattr(section, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class PictureRow:
    """A picture with its caption.

    Attributes:
        origin: What people call it: the path as they gave it.
        file: Where its bytes are.
        caption: As it was read, without the trigger.
        content_hash: Of the file's bytes.
        width: Of the upright picture, in pixels.
        height: Of the upright picture, in pixels.
        bucket: Width and height in pixels of what is trained on.
        crop: Which part that is, where nothing is drawn at random.
        repeats: How often it comes in an epoch.
        weight: Factor of its loss.
        prior: Whether it is a regularisation picture.
        mask: A file, its own alpha channel, or None.
        augmentation: What is drawn anew each time.
        notes: What was done to it on reading, in a few words each.
    """

    origin: str
    file: Path
    caption: str
    content_hash: str
    width: int
    height: int
    bucket: tuple[int, int]
    crop: Crop
    repeats: int = 1
    weight: float = 1.0
    prior: bool = False
    mask: Mask | None = None
    augmentation: Augmentation = Augmentation()
    notes: tuple[str, ...] = ()
