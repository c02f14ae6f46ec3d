"""The data section of a recipe for pictures: where they and their captions are, how they are cut, shown and masked."""

from typing import Annotated, Literal

from pydantic import Field

from haori.core.methods import Auto, Positive
from haori.data.section import DataSection

__all__ = ["PictureSection"]

_Share = Annotated[float, Field(ge=0.0, le=1.0)]


class PictureSection(DataSection):
    """Pictures with captions, and how to read them."""

    path: str = Field(
        description="Folder or zip of pictures, a kohya dataset TOML, a OneTrainer concepts JSON, or a set of pictures "
        "saved by `datasets` or as Parquet."
    )
    max_rows: Positive | None = Field(default=None, description="Read at most this many pictures.")
    caption: str | None = Field(
        default=None, description="Caption of every picture that has none of its own; it may be empty."
    )
    caption_extension: Literal["auto", ".txt", ".caption"] = Field(
        default="auto", description="Ending of the caption files beside the pictures; `auto` takes either."
    )
    caption_column: str | None = Field(
        default=None, description="Column of the captions in metadata or a dataset, where its name does not tell."
    )
    trigger: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Words put before every caption that does not hold them yet."
    )
    caption_dropout: _Share = Field(
        default=0.0, description="Share of the steps of a picture in which its caption is empty."
    )
    shuffle_caption: bool = Field(
        default=False, description="Put the parts of a caption into a new order each time; the trigger stays in front."
    )
    keep_tokens: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Parts at the front of a caption that stay there when it is shuffled."
    )
    caption_separator: Annotated[str, Field(min_length=1)] = Field(
        default=",", description="What stands between the parts of a caption that is shuffled."
    )
    resolution: Auto | Positive = Field(
        default="auto", description="Side in pixels of a square picture; `auto` is what the base was made for."
    )
    buckets: bool = Field(
        default=True, description="Keep each picture's shape nearly, at the same area; else all are cut to squares."
    )
    bucket_step: Auto | Positive = Field(
        default="auto",
        description="Sides of buckets are multiples of this many pixels; `auto` is 64, or an eighth of the resolution "
        "where that is less.",
    )
    max_aspect: Annotated[float, Field(ge=1.0, le=8.0)] = Field(
        default=2.5, description="Longest side of a bucket divided by its shortest, at most."
    )
    crop: Literal["centre", "random", "smart"] = Field(
        default="centre",
        description="Which part of a picture is kept where it does not fit: the middle, another one each time, or the "
        "one that draws the eye.",
    )
    too_small: Literal["enlarge", "drop", "error"] = Field(
        default="enlarge", description="What happens to pictures with a side shorter than needed; always counted."
    )
    flip: bool = Field(
        default=False, description="Mirror pictures left to right half of the time; text and asymmetry suffer."
    )
    colour: _Share = Field(
        default=0.0, description="Strength of random changes of brightness, contrast, saturation and hue."
    )
    repeats: Positive = Field(default=1, description="How often each picture comes in an epoch.")
    regularisation: str | None = Field(
        default=None, description="Pictures of the class at large, learnt beside the others so that it is kept."
    )
    prior_weight: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="Weight of the loss of regularisation pictures."
    )
    masks: Literal["none", "alpha", "files"] = Field(
        default="none",
        description="What weighs the loss over a picture: nothing, its alpha channel, or a grey picture of the same "
        "name, beside it with `-masklabel` or `-mask` behind the name, or in `mask_folder`.",
    )
    mask_folder: str | None = Field(default=None, description="Folder of mask files.")
    unmasked_weight: _Share = Field(default=0.0, description="Weight of the loss where a mask is black.")
