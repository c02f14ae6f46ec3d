"""Pictures as part of a page: small enough to load at once, as addresses that hold the file itself."""

import base64
import io
from pathlib import Path

__all__ = ["embedded"]

_LONGEST = 256  # pixels of a side


def embedded(path: Path, *, longest: int | None = _LONGEST) -> str:
    """Return a picture as a `data:` address.

    Args:
        path: Of the picture.
        longest: Side in pixels above which it is made smaller; None leaves it as it is.
    """
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if longest is not None:
        image.thumbnail((longest, longest))
    held = io.BytesIO()
    image.save(held, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
