"""Fifty pictures in one style that come with the package, to try things on; data/samples/pictures has the licence."""

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from haori.core.storage import staged_folder

__all__ = ["ATTRIBUTION", "LICENCE", "write_sample_pictures"]

LICENCE = "MIT"
ATTRIBUTION = "Fluent Emoji, Microsoft Corporation"


def write_sample_pictures(into: Path) -> Path:
    """Copy the pictures with their captions into the folder `lineart` of a folder, unless it is there; return it."""
    folder = into / "lineart"
    if not folder.is_dir():
        samples = files("haori.data") / "samples" / "pictures"
        with as_file(samples) as source, staged_folder(folder) as stage:
            for path in sorted((source / "lineart").iterdir()):
                shutil.copyfile(path, stage / path.name)
            shutil.copyfile(source / "ATTRIBUTION.md", stage / "ATTRIBUTION.md")
    return folder
