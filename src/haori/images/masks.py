"""What is done to a picture and its mask before and after inpainting: sizes, soft edges, fills, the masked part alone.

Masks are in L: white is drawn anew. Boxes are (left, top, right, bottom) and sizes (width, height), in pixels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from haori.core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MaskedPart", "blurred", "filled", "masked_part", "sized"]

_FILL_BLURS = (256, 64, 16, 4, 1)  # pixels, the widest first
_KERNEL_SIGMAS = 2.5


def sized(image: "Image", size: tuple[int, int], mode: str) -> "Image":
    """Return a picture in a size.

    Args:
        image: The picture.
        size: Width and height.
        mode: `stretch`; `crop` keeps its proportions and cuts off what is outside; `fill` keeps them and draws its
            outermost pixels out to the sides.
    """
    from PIL import Image as Images
    from PIL import ImageOps

    lanczos = Images.Resampling.LANCZOS
    if image.size == size or mode == "stretch":
        return image if image.size == size else image.resize(size, lanczos)
    if mode == "crop":
        return ImageOps.fit(image, size, lanczos)
    within = ImageOps.contain(image, size, lanczos)
    whole = Images.new(image.mode, size)
    left, top = (size[0] - within.width) // 2, (size[1] - within.height) // 2
    right, bottom = size[0] - within.width - left, size[1] - within.height - top
    edges = (
        ((0, 0, within.width, 1), (size[0], top), (0, 0)),
        ((0, within.height - 1, within.width, within.height), (size[0], bottom), (0, size[1] - bottom)),
        ((0, 0, 1, within.height), (left, size[1]), (0, 0)),
        ((within.width - 1, 0, within.width, within.height), (right, size[1]), (size[0] - right, 0)),
    )
    for box, of, at in edges:
        if of[0] and of[1]:
            whole.paste(within.resize(of, Images.Resampling.NEAREST, box=box), at)
    whole.paste(within, (left, top))
    return whole


def blurred(mask: "Image", across: float, down: float) -> "Image":
    """Return a mask with soft edges: a Gaussian of these standard deviations in pixels, cut off at 2.5 of them."""
    if not across and not down:
        return mask
    import numpy as np
    from PIL import Image as Images
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

    values = np.asarray(mask, dtype=np.float32)
    soft = gaussian_filter(values, (down, across), mode="mirror", truncate=_KERNEL_SIGMAS)
    return Images.fromarray(np.rint(soft).clip(0, 255).astype(np.uint8))


def filled(image: "Image", mask: "Image") -> "Image":
    """Return a picture whose masked part has the colours around it, blurred the more the further in they are."""
    from PIL import Image as Images
    from PIL import ImageFilter, ImageOps, ImageStat

    seen = ImageOps.invert(mask.convert("L"))
    if seen.getbbox() is None:
        return image
    around = image.convert("RGBA")
    around.putalpha(seen)
    weighted = around.convert("RGBa")  # colours times alpha, so that the blur takes none of the masked part
    colours = Images.new("RGB", image.size, tuple(map(round, ImageStat.Stat(image, mask=seen).mean)))
    for radius in _FILL_BLURS:
        blur = weighted.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        within_reach = blur.getchannel("A").point([min(255, 4 * value) for value in range(256)])
        colours.paste(blur.convert("RGB"), mask=within_reach)
    return Images.composite(image, colours, seen)


@dataclass(frozen=True)
class MaskedPart:
    """The part of a picture that is drawn alone, in the size of a whole one, and how it goes back.

    Attributes:
        image: The part, enlarged.
        mask: The mask of it, enlarged.
    """

    image: "Image"
    mask: "Image"
    _whole: "Image"
    _whole_mask: "Image"
    _box: tuple[int, int, int, int]

    def put_back(self, drawn: "Image") -> "Image":
        """Return the whole picture with the drawn part in it; what is black in the mask stays to the byte."""
        from PIL import Image as Images

        left, top, right, bottom = self._box
        changed = self._whole.copy()
        changed.paste(drawn.resize((right - left, bottom - top), Images.Resampling.LANCZOS), (left, top))
        return Images.composite(changed, self._whole, self._whole_mask)


def masked_part(image: "Image", mask: "Image", size: tuple[int, int], padding: int) -> MaskedPart:
    """Cut out what a mask covers, with some of what is around it.

    Args:
        image: The picture.
        mask: Of its size.
        size: That the part is drawn in.
        padding: Pixels around the masked part that are drawn with it.

    Raises:
        InputError: Nothing of the mask is white.
    """
    box = mask.getbbox()
    if box is None:
        raise InputError("The mask has no white part, so nothing would be drawn; make white what is to be drawn anew.")
    left, top, right, bottom = box
    found = (
        max(0, left - padding), max(0, top - padding), min(image.width, right + padding),
        min(image.height, bottom + padding),
    )  # fmt: skip
    found = _proportioned(found, size, image.size)
    part, cover = (one.crop(found) for one in (image, mask))
    return MaskedPart(sized(part, size, "stretch"), sized(cover, size, "stretch"), image, mask, found)


def _proportioned(
    box: tuple[int, int, int, int], size: tuple[int, int], bounds: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return a box grown to the proportions of a size, as far as the bounds let it."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if width * size[1] > height * size[0]:
        top, bottom = _grown(top, bottom, round(width * size[1] / size[0]), bounds[1])
    else:
        left, right = _grown(left, right, round(height * size[0] / size[1]), bounds[0])
    return left, top, right, bottom


def _grown(start: int, end: int, length: int, bound: int) -> tuple[int, int]:
    length = min(max(length, end - start), bound)
    begin = min(max(0, start - (length - (end - start)) // 2), bound - length)
    return begin, begin + length
