"""The pictures of one style that Haori ships."""

from pathlib import Path

from PIL import Image

import haori.data

FOLDER = Path(haori.data.__file__).parent / "samples" / "pictures"


def test_fifty_pictures_each_with_a_caption_that_does_not_name_the_style():
    pictures = sorted((FOLDER / "lineart").glob("*.png"))
    assert len(pictures) == 50
    for picture in pictures:
        with Image.open(picture) as opened:
            assert opened.size == (64, 64)
            assert opened.getextrema() == (0, 255)  # ink and paper
        caption = picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
        assert caption.split() == picture.stem.split("-")
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= 400_000


def test_their_licence_is_beside_them():
    assert "MIT License" in (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
