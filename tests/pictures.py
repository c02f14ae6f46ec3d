"""Folders of small pictures, each unlike the others, made with PIL."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from haori.data.pictures.dataset import PictureSplit, read_pictures
from haori.data.pictures.section import PictureSection

__all__ = ["picture", "picture_folder", "read", "section_of"]


def picture(seed: int, size: tuple[int, int] = (96, 96), mode: str = "RGB") -> Image.Image:
    """Return smooth random colours: no two seeds look alike."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, size=(6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).convert(mode)


def picture_folder(
    folder: Path, count: int = 12, *, caption: str | None = "a picture of {}", size: tuple[int, int] = (96, 96)
) -> Path:
    """Write `count` pictures 00.png, 01.png ... with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number, size).save(folder / f"{number:02}.png")
        if caption is not None:
            (folder / f"{number:02}.txt").write_text(caption.format(number), encoding="utf-8")
    return folder


def section_of(path: Path | str, **keys: Any) -> PictureSection:
    return PictureSection(path=str(path), **keys)


def read(path: Path | str, *, tolerant: bool = False, cut: Any = lambda caption: "", **keys: Any) -> PictureSplit:
    """Read pictures for a base that is made for 64 x 64 and takes sides that divide by 8."""
    return read_pictures(section_of(path, **keys), native_size=64, size_multiple=8, cut=cut, tolerant=tolerant)
