"""How alike two pictures look: a perceptual hash by cosine transform, and a small coloured copy that confirms it.

The hash is pHash (Zauner 2010): the lowest 8 x 8 frequencies of a 32 x 32 grey copy, each above or below their median.
It knows no colours, and flat pictures have few frequencies, so pictures count as near-duplicates only when their
8 x 8 coloured copies agree as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haori.data.progress import tracked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["Likeness", "group_alike", "likeness_of"]

_SIDE, _LOW, _COPY = 32, 8, 8
_BITS = 10
_LEVELS = 4.0
_PAIRS = 1 << 22  # compared at once


@dataclass(frozen=True, slots=True)
class Likeness:
    """How a picture looks.

    Attributes:
        bits: 64 bits of its perceptual hash.
        copy: [192] uint8, 8 x 8 pixels in RGB.
    """

    bits: int
    copy: "NDArray[np.uint8]"


def likeness_of(image: "Image") -> Likeness:
    """Return how an RGB picture looks."""
    import numpy as np
    from PIL.Image import Resampling

    small = image.resize((_SIDE, _SIDE), Resampling.LANCZOS, reducing_gap=3.0)
    grey = np.asarray(small.convert("L"), dtype=np.float64)
    basis = _cosines()
    low = (basis @ grey @ basis.T).reshape(-1)
    bits = int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
    return Likeness(bits, np.asarray(small.resize((_COPY, _COPY), Resampling.BOX), dtype=np.uint8).reshape(-1))


def _cosines() -> "NDArray[np.float64]":
    """Return the first rows of the DCT-II of length 32: [8, 32]."""
    import numpy as np

    frequency, place = np.arange(_LOW)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(math.pi * frequency * (2 * place + 1) / (2 * _SIDE))


def group_alike(pictures: Sequence[Likeness]) -> list[int]:
    """Return for each picture the number of its group: pictures that look alike, and those like them, have one.

    Pictures look alike when at most 10 of 64 bits differ and their small copies differ by at most 4 of 255 levels on
    average. A group has the number of its first picture.
    """
    import numpy as np

    parent = list(range(len(pictures)))
    if not pictures:
        return parent

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    bits = np.array([picture.bits for picture in pictures], dtype=np.uint64)
    copies = np.stack([picture.copy for picture in pictures]).astype(np.int16)
    block = max(1, _PAIRS // len(pictures))
    starts = range(0, len(pictures), block)
    for start in tracked(starts, "Comparing pictures", total=len(starts), every=1):
        rows: NDArray[Any] = bits[start : start + block, None] ^ bits[None, :]
        for row, other in zip(*np.nonzero(np.bitwise_count(rows) <= _BITS), strict=True):
            one, two = start + int(row), int(other)
            if one < two and np.abs(copies[one] - copies[two]).mean() <= _LEVELS:
                first, second = sorted((root(one), root(two)))
                parent[second] = first
    return [root(number) for number in range(len(pictures))]
