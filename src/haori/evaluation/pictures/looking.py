"""What a network sees in pictures: in those of the data as they are trained on, and in drawn ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from haori.core.progress_bar import progress_bar
from haori.data.pictures.opening import open_picture
from haori.metrics.picture_features import Seen

if TYPE_CHECKING:
    from PIL.Image import Image

    from haori.data.pictures import PictureRow
    from haori.metrics.picture_networks import PictureNetwork

__all__ = ["cropped", "look", "look_at_rows"]

_AT_ONCE = 16


def cropped(row: "PictureRow") -> "Image":
    """Return a picture of the data, cut as in training."""
    image = open_picture(row.file, row.origin).image.convert("RGB").resize(row.crop.scaled)
    width, height = row.bucket
    return image.crop((row.crop.left, row.crop.top, row.crop.left + width, row.crop.top + height))


def look(
    network: "PictureNetwork", pictures: "Sequence[Image]", texts: Sequence[str] | None = None, *, title: str
) -> Seen:
    """Look at pictures, with a progress bar."""
    parts = []
    with progress_bar(title, len(pictures), "pictures") as advance:
        for start in range(0, len(pictures), _AT_ONCE):
            some = pictures[start : start + _AT_ONCE]
            parts.append(network.see(some, None if texts is None else texts[start : start + _AT_ONCE]))
            advance(len(some))
    columns = ([part for part in column if part is not None] for column in zip(*parts, strict=True))
    features, classes, likeness = (np.concatenate(column) if column else None for column in columns)
    assert features is not None
    return Seen(features, classes, likeness)


def look_at_rows(network: "PictureNetwork", rows: "Sequence[PictureRow]", *, title: str) -> Seen:
    """Look at pictures of the data, a few in memory at once."""
    parts = []
    with progress_bar(title, len(rows), "pictures") as advance:
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            parts.append(network.see([cropped(row) for row in some]).features)
            advance(len(some))
    return Seen(np.concatenate(parts))
