"""What an evaluation of pictures shows besides figures: pictures side by side, and those taken for copies."""

from dataclasses import dataclass

__all__ = ["DrawnPair", "LikelyCopy", "MeasuredPictures"]


@dataclass(frozen=True)
class DrawnPair:
    """One prompt and seed, drawn by both systems.

    Attributes:
        prompt: What was asked for, without tags.
        seed: Of both pictures.
        unrelated: Whether it has nothing to do with the data.
        base: File of the base's picture, beside the report.
        adapter: File of the adapter's.
        base_distance: Of the base's picture to the nearest training picture; None where that was not looked for.
        adapter_distance: Of the adapter's.
    """

    prompt: str
    seed: int
    unrelated: bool
    base: str
    adapter: str
    base_distance: float | None = None
    adapter_distance: float | None = None


@dataclass(frozen=True)
class LikelyCopy:
    """A picture of the adapter that is as near to a training picture as few of these are to one another.

    Attributes:
        prompt: What was asked for.
        seed: Of the picture.
        drawn: Its file, beside the report.
        training: File of the training picture, cut as in training, beside the report.
        origin: Where the training picture came from.
        distance: Between the two.
        base_distance: Of the base's picture of the same prompt and seed to its nearest training picture.
    """

    prompt: str
    seed: int
    drawn: str
    training: str
    origin: str
    distance: float
    base_distance: float


@dataclass(frozen=True)
class MeasuredPictures:
    """The pictures of an evaluation.

    Attributes:
        network: What looked at them.
        settings: How they were drawn, by what people call it.
        pairs: All of them, those of the prompts first.
        shown: Places among `pairs` of those that the report shows.
        limit: Distance up to which a picture is taken for a copy; None where copies were not looked for.
        copies: Those of the adapter, the nearest first.
        sheet: File of the sheet, beside the report.
    """

    network: str
    settings: dict[str, str]
    pairs: tuple[DrawnPair, ...]
    shown: tuple[int, ...]
    limit: float | None
    copies: tuple[LikelyCopy, ...]
    sheet: str
