"""Pictures with a colour profile of their own, such as Display P3 of telephones or CMYK of a printer, brought to sRGB.

Models are trained on sRGB; the same numbers under another profile are other colours.
"""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["to_srgb"]

_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


def to_srgb(image: "Image", notes: list[str]) -> "Image":
    """Return a picture in sRGB by the profile in it; as it is where it has none, or one of sRGB.

    Args:
        image: Of 8 bits, in any mode; transparency is kept.
        notes: Gets what was done in a few words.
    """
    from PIL import Image, ImageCms

    raw = image.info.get("icc_profile")
    if not raw:
        return image
    if image.mode == "RGBA":
        plain = image.convert("RGB")
        plain.info["icc_profile"] = raw
        return Image.merge("RGBA", (*to_srgb(plain, notes).split(), image.getchannel("A")))
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(raw))
        if profile.profile.xcolor_space.strip() != _SPACES.get(image.mode):
            return image  # a palette, say, whose colours the profile does not speak of
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        changed = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("unreadable colour profile")
        return image
    notes.append("colour profile to sRGB")
    return image if changed is None else changed
