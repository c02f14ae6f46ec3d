"""Fetches sets of emoji as SVG through npm and renders them as pictures of 64 x 64 pixels on white."""

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["PACKAGES", "SIZE", "IconSet", "fetch", "render_all"]

SIZE = 64
PACKAGES = {
    "noto": ("1.2.9", "Apache-2.0"),
    "fluent-emoji-flat": ("1.2.6", "MIT"),
    "emojione-monotone": ("1.2.1", "CC-BY-4.0"),
    "fluent-emoji-high-contrast": ("1.2.6", "MIT"),
    "twemoji": ("1.2.5", "CC-BY-4.0"),
}
"""Version and licence of each set's npm package `@iconify-json/<set>`."""


def fetch(icon_set: str, folder: Path) -> Path:
    """Return the tarball of `icon_set` in `folder`, fetched with `npm pack` from the configured registry if absent."""
    version, _ = PACKAGES[icon_set]
    tarball = folder / f"iconify-json-{icon_set}-{version}.tgz"
    if not tarball.exists():
        folder.mkdir(parents=True, exist_ok=True)
        package = f"@iconify-json/{icon_set}@{version}"
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
    return tarball


class IconSet:
    """One set of icons, by CLDR name with hyphens."""

    def __init__(self, tarball: Path) -> None:
        with tarfile.open(tarball) as archive:
            member = archive.extractfile("package/icons.json")
            assert member is not None
            self._document: dict[str, Any] = json.load(member)

    def __contains__(self, name: str) -> bool:
        return name in self._document["icons"]

    def svg(self, name: str) -> str:
        """Return an icon as a document of its own; what has no colour is drawn black."""
        icon = self._document["icons"][name]
        left, top, width, height = (
            icon.get(key, self._document.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )

    def render(self, name: str) -> Image.Image:
        """Draw an icon on white, 64 x 64 pixels."""
        import resvg_py

        drawn = bytes(resvg_py.svg_to_bytes(svg_string=self.svg(name), width=2 * SIZE, height=2 * SIZE))
        icon = Image.open(io.BytesIO(drawn)).convert("RGBA").resize((2 * SIZE, 2 * SIZE))
        paper = Image.new("RGBA", icon.size, "white")
        paper.alpha_composite(icon)
        return paper.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)


def render_all(sets: dict[str, str], names: tuple[str, ...], folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Render `names` in every set of `sets` (style word to set), where the set has them.

    Args:
        sets: Style word and icon set.
        names: CLDR names with hyphens.
        folder: Where tarballs are, or go to.

    Returns:
        (style word, name) to a picture, uint8 [64, 64, 3].
    """
    drawn = {}
    for style, icon_set in sets.items():
        icons = IconSet(fetch(icon_set, folder))
        for name in names:
            if name in icons:
                drawn[style, name] = np.asarray(icons.render(name))
    return drawn
