"""A row's pixels and mask as tensors: opened, scaled, cut, and changed as was drawn."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from haori.core.errors import DataError
from haori.core.hashing import hash_file
from haori.data.pictures.opening import open_mask, open_picture
from haori.data.pictures.row import ALPHA, Crop, PictureRow

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["Colours", "draw_colours", "draw_crop", "loss_weights", "mask_of", "pixels"]

_HUE_DEGREES = 18.0


@dataclass(frozen=True, slots=True)
class Colours:
    """A change of colours: factors (1 changes nothing), and a turn of the hue in degrees."""

    brightness: float
    contrast: float
    saturation: float
    hue_degrees: float


def draw_colours(row: PictureRow, random: "np.random.Generator") -> Colours | None:
    """Draw a change of colours as strong as the row allows; None where it allows none.

    At strength 1 factors lie between 0.5 and 1.5 and the hue turns by up to 18 degrees.
    """
    strength = row.augmentation.colour
    if not strength:
        return None
    shifts = random.uniform(-1.0, 1.0, size=4) * strength
    brightness, contrast, saturation = (1.0 + float(shift) / 2 for shift in shifts[:3])
    return Colours(brightness, contrast, saturation, float(shifts[3]) * _HUE_DEGREES)


def draw_crop(row: PictureRow, random: "np.random.Generator") -> Crop:
    """Draw the part of the picture that is seen: any, each as likely, or the row's own where it is not random."""
    if row.augmentation.crop != "random":
        return row.crop
    spare = [whole - part for whole, part in zip(row.crop.scaled, row.bucket, strict=True)]
    left, top = (int(random.integers(0, most, endpoint=True)) for most in spare)
    return Crop(row.crop.scaled, left, top)


def pixels(row: PictureRow, *, flip: bool = False, colour: Colours | None = None, crop: Crop | None = None) -> "Tensor":
    """Return what is trained on of a picture: [3, H, W], float32 in -1..1, of the size of its bucket.

    Args:
        row: The picture.
        flip: Mirror it left to right, after the cut.
        colour: From `draw_colours`.
        crop: From `draw_crop`; the row's own by default.

    Raises:
        DataError: The file has changed or gone since it was read.
    """
    import numpy as np
    import torch

    _require_unchanged(row)
    image = _cut(open_picture(row.file, row.origin).image, row, crop or row.crop)
    if colour is not None:
        image = _coloured(image, colour)
    values = np.asarray(image, dtype=np.float32) / 127.5 - 1.0  # [H, W, 3]
    if flip:
        values = values[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _require_unchanged(row: PictureRow) -> None:
    """Refuse a file that is another than was read: its latents would be kept under the hash of the old one."""
    try:
        unchanged = hash_file(row.file) == row.content_hash
    except OSError as error:
        raise DataError(f"{row.origin} cannot be read: {error.strerror or error}.") from None
    if not unchanged:
        raise DataError(f"{row.origin} has changed since the pictures were read; start again.")


def mask_of(row: PictureRow, *, flip: bool = False, crop: Crop | None = None) -> "Tensor | None":
    """Return the mask of the same part: [1, H, W], float32, 0 where nothing is to be learnt, 1 where all; or None.

    A file of another size than its picture is scaled to it. A picture without alpha is white all over.

    Raises:
        DataError: The file has changed or gone since it was read.
    """
    import numpy as np
    import torch

    if row.mask is None:
        return None
    if row.mask == ALPHA:
        mask = open_picture(row.file, row.origin).alpha
        if mask is None:
            return torch.ones(1, row.bucket[1], row.bucket[0])
    else:
        mask = open_mask(row.mask, str(row.mask))
    values = np.asarray(_cut(mask, row, crop or row.crop), dtype=np.float32) / 255.0  # [H, W]
    if flip:
        values = values[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(values)[None])


def loss_weights(mask: "Tensor", height: int, width: int, unmasked_weight: float) -> "Tensor":
    """Return the weight of the loss of each latent pixel: u + (1 - u) m, with m the mean of the mask over its area.

    Args:
        mask: [1, H, W] from `mask_of`.
        height: Of the latents.
        width: Of the latents.
        unmasked_weight: u, the weight where the mask is black.

    Returns:
        [1, height, width], float32.
    """
    from torch.nn.functional import adaptive_avg_pool2d

    mean = adaptive_avg_pool2d(mask[None], (height, width))[0]
    return unmasked_weight + (1.0 - unmasked_weight) * mean


def _cut(image: "Image", row: PictureRow, crop: Crop) -> "Image":
    """Return the part of a picture, or of its mask of any size, that the crop shows.

    Only that part is scaled: a strip of 1 x 5,000 pixels, scaled whole to cover its bucket, would fill the memory.
    """
    from PIL import Image

    (width, height), (left, top) = row.bucket, (crop.left, crop.top)
    if image.size == crop.scaled:
        return image.crop((left, top, left + width, top + height))
    across, down = (whole / scaled for whole, scaled in zip(image.size, crop.scaled, strict=True))
    right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
    return image.resize(row.bucket, Image.Resampling.LANCZOS, box=(left * across, top * down, right, bottom))


def _coloured(image: "Image", colours: Colours) -> "Image":
    from PIL import Image, ImageEnhance

    image = ImageEnhance.Brightness(image).enhance(colours.brightness)
    image = ImageEnhance.Contrast(image).enhance(colours.contrast)
    image = ImageEnhance.Color(image).enhance(colours.saturation)
    hue, saturation, value = image.convert("HSV").split()
    turn = round(colours.hue_degrees / 360.0 * 256.0)
    return Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), saturation, value)).convert("RGB")
