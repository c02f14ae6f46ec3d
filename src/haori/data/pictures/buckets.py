"""Aspect-ratio buckets: sizes of about one area, of which each picture gets the one nearest to its shape.

As NovelAI described them (2022) and kohya's sd-scripts made common. Knows nothing of files.
"""

import math
from collections.abc import Sequence

from haori.core.errors import DataError
from haori.data.pictures.row import Crop
from haori.data.pictures.section import PictureSection

__all__ = ["bucket_of", "buckets_of", "cover", "sizes_for"]

_STEP = 64


def sizes_for(section: PictureSection, native_size: int, size_multiple: int) -> list[tuple[int, int]]:
    """Return the buckets that a section asks for.

    Args:
        section: With resolution, step and widest shape.
        native_size: Side in pixels of the squares that the base was made for.
        size_multiple: What sides in pixels must divide by for this base.

    Raises:
        DataError: A size does not divide by `size_multiple`.
    """
    side = native_size if section.resolution == "auto" else section.resolution
    _check_multiple("resolution", side, size_multiple)
    if not section.buckets:
        return [(side, side)]
    step = section.bucket_step
    if step == "auto":
        step = max(1, min(_STEP, side // 8) // size_multiple) * size_multiple
    _check_multiple("bucket_step", step, size_multiple)
    return buckets_of(side, step, section.max_aspect)


def _check_multiple(key: str, value: int, multiple: int) -> None:
    if value % multiple:
        below = value - value % multiple
        near = " or ".join(str(size) for size in (below, below + multiple) if size)
        raise DataError(f"data.{key} is {value}, but sides for this base must divide by {multiple}; give {near}.")


def buckets_of(side: int, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """Return (width, height) of every bucket, the narrowest first.

    Each has at most the area of the square, and for its width the greatest height that is a multiple of the step, or
    the other way round. The square itself is always among them.
    """
    area = side * side
    found = {(side, side)}
    for longer in range(step * math.ceil(side / step), int(side * math.sqrt(max_aspect)) + step, step):
        shorter = area // longer // step * step
        if shorter and longer <= shorter * max_aspect:
            found |= {(longer, shorter), (shorter, longer)}
    return sorted(found, key=lambda size: (size[0] / size[1], size))


def bucket_of(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size whose shape is nearest (by the logarithm of width over height), the largest of several."""
    wanted = math.log(width / height)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - wanted), 9), -size[0] * size[1]))


def cover(width: int, height: int, bucket: tuple[int, int], centre: tuple[float, float] = (0.5, 0.5)) -> Crop:
    """Return the crop that scales a picture just so far that it covers its bucket.

    Args:
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        bucket: What is cut out.
        centre: Point of the picture, as shares of its sides, that comes as near to the middle as can be.
    """
    factor = max(bucket[0] / width, bucket[1] / height)
    scaled = (max(bucket[0], round(width * factor)), max(bucket[1], round(height * factor)))
    left, top = (
        min(max(round(share * whole - part / 2), 0), whole - part)
        for share, whole, part in zip(centre, scaled, bucket, strict=True)
    )
    return Crop(scaled, left, top)
