"""What is drawn to measure an adapter for pictures: prompts, unrelated prompts, seeds and settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from haori.core.errors import InputError
from haori.data.pictures import PictureRow, full_caption
from haori.tasks.examination import spread
from haori.tasks.text_to_image.examination import UNRELATED

__all__ = ["UNRELATED_PROMPTS", "Asked", "PictureOptions", "asked_of", "read_prompts"]

UNRELATED_PROMPTS = tuple(prompt for _, prompts in UNRELATED for prompt in prompts if prompt)
"""Prompts about things, places and living things."""

_MOST_PROMPTS = 1_000


@dataclass(frozen=True)
class PictureOptions:
    """How an adapter for pictures is measured.

    Attributes:
        prompts: What to draw; None takes captions of the data.
        most_captions: Captions to take, spread over the data.
        unrelated: Prompts that have nothing to do with the data.
        seeds: Pictures of each prompt, each from a seed of its own.
        seed: The first of them.
        steps: Of the sampler.
        guidance: Strength of the prompt; None for the pipeline's own.
        strength: Of the adapter.
        features: Folder or hub id of the network that looks at pictures; None for EfficientNet-Lite0.
        force_fid: Compute FID however few pictures there are.
        batch: Pictures that are drawn at once.
    """

    prompts: tuple[str, ...] | None = None
    most_captions: int = 32
    unrelated: tuple[str, ...] = field(default=UNRELATED_PROMPTS)
    seeds: int = 2
    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    strength: float = 1.0
    features: str | None = None
    force_fid: bool = False
    batch: int = 8


@dataclass(frozen=True)
class Asked:
    """Prompts, each drawn from so many seeds of its own.

    Attributes:
        prompts: What is drawn.
        seeds: Pictures of each.
        seed: Of the first picture; those that follow have the next ones.
        captions: Whether the prompts are captions of the data, so that there are real pictures of them.
    """

    prompts: tuple[str, ...]
    seeds: int
    seed: int
    captions: bool = False

    @property
    def groups(self) -> list[int]:
        """Return [pictures] number of each picture's prompt."""
        return [number for number in range(len(self.prompts)) for _ in range(self.seeds)]

    @property
    def texts(self) -> list[str]:
        """Return [pictures] prompt of each picture."""
        return [self.prompts[number] for number in self.groups]

    def seed_of(self, picture: int) -> int:
        """Return the seed of a picture by its place."""
        return self.seed + picture


def asked_of(options: PictureOptions, rows: Sequence[PictureRow]) -> tuple[Asked, Asked]:
    """Return what is drawn to be held against the data, and what has nothing to do with them.

    Args:
        options: What was asked for.
        rows: The data, whose captions are taken where no prompts were given.

    Raises:
        InputError: There is nothing to draw.
    """
    captions = options.prompts is None
    prompts = options.prompts or tuple(
        spread(options.most_captions, list(dict.fromkeys(caption for row in rows if (caption := caption_of(row)))))
    )
    if not prompts:
        raise InputError("The data have no captions to draw; give prompts in a file with --prompts, one a line.")
    first = Asked(prompts, options.seeds, options.seed, captions)
    return first, Asked(options.unrelated, options.seeds, options.seed + len(prompts) * options.seeds)


def caption_of(row: PictureRow) -> str:
    """Return the caption of a picture as a prompt: on one line, with the trigger."""
    return " ".join(full_caption(row.caption, row.augmentation).split())


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts from a text file, one a line; blank lines and repeated ones are passed over.

    Raises:
        InputError: It cannot be read, is no text in UTF-8, or holds none or too many.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"The prompts {str(path)!r} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise InputError(f"The prompts {str(path)!r} are not text in UTF-8; save the file as that.") from None
    found = tuple(dict.fromkeys(" ".join(line.split()) for line in text.splitlines() if line.strip()))
    if not 1 <= len(found) <= _MOST_PROMPTS:
        raise InputError(
            f"The file {str(path)!r} holds {len(found):,} prompts; give 1 to {_MOST_PROMPTS:,}, one a line."
        )
    return found
