"""img2img as the web UI means it: how the picture comes to its size, and what a mask does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError, InputError
from haori.images.generation import DrawnPicture
from haori.images.infotext import read_infotext
from haori.images.masks import blurred, filled, masked_part, sized
from haori.server.pictures.given import a1111_mask, picture_of
from haori.server.sdapi.fields import Img2ImgFields

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Begin", "begin"]

_RESIZE = ("stretch", "crop", "fill")
_FILLS = ("fill", "original")
_MOST_PIXELS = 1 << 24


@dataclass(frozen=True)
class Begin:
    """What pictures begin from.

    Attributes:
        settings: Fields of `PictureRequest`.
        finish: What is still to be done to each drawn picture.
    """

    settings: dict[str, Any]
    finish: Callable[[DrawnPicture], DrawnPicture]


def begin(asked: Img2ImgFields, native: int) -> Begin:
    """Read the picture and the mask of a request.

    Args:
        asked: The request.
        native: Side of the pictures that the base was made for.

    Raises:
        InputError: One of them cannot be used, or what is asked for is not served.
    """
    if len(asked.init_images) != 1:
        raise InputError(f"'init_images' has {len(asked.init_images)} pictures; give one, as base64.")
    if not 0 <= asked.resize_mode < len(_RESIZE):
        raise InputError(f"'resize_mode' cannot be {asked.resize_mode}: there are 0 (stretch), 1 (crop) and 2 (fill).")
    image = picture_of(asked.init_images[0], "The picture in 'init_images'").image
    _check_pixels(image.size)
    size = None if asked.width is None or asked.height is None else (asked.width, asked.height)
    if size is not None and min(size) < 1:
        raise InputError(f"A picture cannot have {size[0]} x {size[1]} pixels.")
    mode = _RESIZE[asked.resize_mode]
    if asked.mask is None:
        return Begin({"init": image if size is None else _sized(image, size, mode)}, lambda picture: picture)
    return _masked(asked, image, size or (native, native) if asked.inpaint_full_res else size, mode)


def _masked(asked: Img2ImgFields, image: "Image", size: tuple[int, int] | None, mode: str) -> Begin:
    from PIL import ImageOps

    if not 0 <= asked.inpainting_fill < len(_FILLS):
        raise InputError(
            f"'inpainting_fill' cannot be {asked.inpainting_fill}: there are 0 (fill) and 1 (original); latent "
            "noise and latent nothing are not served."
        )
    assert asked.mask is not None
    mask = a1111_mask(picture_of(asked.mask, "The picture in 'mask'"), rounded=asked.mask_round)
    if mask.size != image.size:
        raise DataError(
            f"The mask has {mask.width:,} x {mask.height:,} pixels and the picture {image.width:,} x {image.height:,}; "
            "give a mask of the picture's size."
        )
    if asked.inpainting_mask_invert:
        mask = ImageOps.invert(mask)
    across, down = (asked.mask_blur,) * 2 if asked.mask_blur is not None else (asked.mask_blur_x, asked.mask_blur_y)
    mask = blurred(mask, across, down)
    told = {"Mask blur": f"{across:g}" if across == down else f"{across:g}x{down:g}"}
    told |= {"Masked content": "fill"} if asked.inpainting_fill == 0 else {}
    put_back = None
    if asked.inpaint_full_res:
        assert size is not None
        _check_pixels(size)
        part = masked_part(image, mask, size, asked.inpaint_full_res_padding)
        image, mask, put_back = part.image, part.mask, part.put_back
        told |= {"Inpaint area": "Only masked", "Masked area padding": str(asked.inpaint_full_res_padding)}
    elif size is not None:
        image, mask = _sized(image, size, mode), _sized(mask, size, mode)
    if asked.inpainting_fill == 0:
        image = filled(image, mask)

    def finish(picture: DrawnPicture) -> DrawnPicture:
        info = read_infotext(picture.infotext)
        settings = dict(info.settings)
        version = settings.pop("Version")
        text = replace(info, settings={**settings, **told, "Version": version}).text()
        return replace(picture, infotext=text, image=put_back(picture.image) if put_back else picture.image)

    return Begin({"init": image, "mask": mask}, finish)


def _sized(image: "Image", size: tuple[int, int], mode: str) -> "Image":
    _check_pixels(size)
    return sized(image, size, mode)


def _check_pixels(size: tuple[int, int]) -> None:
    """Refuse a size that would take long before it is drawn at all."""
    if size[0] * size[1] > _MOST_PIXELS:
        raise InputError(f"A picture of {size[0]:,} x {size[1]:,} pixels is too large; make it smaller.")
