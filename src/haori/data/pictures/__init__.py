"""Pictures with captions: from files to rows that are checked, bucketed and split, and rows to tensors.

Knows nothing about models; it is told what sizes a base takes and how much text its encoder reads. Importing this
package is light: the names below are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.data.pictures.captions import full_caption, training_caption
    from haori.data.pictures.dataset import PictureSplit, read_pictures
    from haori.data.pictures.row import Augmentation, Crop, PictureRow
    from haori.data.pictures.section import PictureSection
    from haori.data.pictures.sheet import contact_sheet
    from haori.data.pictures.sources import holds_pictures
    from haori.data.pictures.tensors import Colours, draw_colours, draw_crop, loss_weights, mask_of, pixels

__all__ = [
    "Augmentation",
    "Colours",
    "Crop",
    "PictureRow",
    "PictureSection",
    "PictureSplit",
    "contact_sheet",
    "draw_colours",
    "draw_crop",
    "full_caption",
    "holds_pictures",
    "loss_weights",
    "mask_of",
    "pixels",
    "read_pictures",
    "training_caption",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "sheet": ("contact_sheet",),
        "sources": ("holds_pictures",),
        "captions": ("full_caption", "training_caption"),
        "dataset": ("PictureSplit", "read_pictures"),
        "tensors": ("Colours", "draw_colours", "draw_crop", "loss_weights", "mask_of", "pixels"),
        "row": ("Augmentation", "Crop", "PictureRow"),
        "section": ("PictureSection",),
    },
)
