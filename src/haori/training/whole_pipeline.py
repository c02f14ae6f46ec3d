"""What a full fine-tuning of a pipeline writes: a folder in the layout of diffusers, which its stock pipeline loads.

Components that were trained are written anew; everything else is the base's own, file by file.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.bases.pipeline import PIPELINE_INDEX
from haori.core.errors import BaseError

if TYPE_CHECKING:
    from torch import nn

    from haori.bases import Base

__all__ = ["save_pipeline_folder"]


def save_pipeline_folder(model: "nn.Module", base: "Base", folder: Path) -> None:
    """Write the base with the model's components in place of its own into the existing `folder`.

    Args:
        model: A `haori.bases.diffusion.DiffusionModel`, trained.
        base: The pipeline it was loaded from.
        folder: Where to write.

    Raises:
        BaseError: The base is not kept in the layout of diffusers.
    """
    from haori.bases.quiet import quiet_diffusers

    if not (base.path / PIPELINE_INDEX).is_file():
        raise BaseError(f"The base {base.name!r} has no {PIPELINE_INDEX}, so no pipeline can be written like it.")
    trained: dict[str, Any] = dict(model.named_children())
    parts = [name for name in _parts(base.path) if name not in trained]
    shutil.copyfile(base.path / PIPELINE_INDEX, folder / PIPELINE_INDEX)
    for name in parts:
        shutil.copytree(base.path / name, folder / name)
    with quiet_diffusers():
        for name, component in trained.items():
            component.save_pretrained(folder / name, safe_serialization=True)


def _parts(path: Path) -> list[str]:
    """Return the names of a pipeline's parts that have a folder."""
    from haori.bases.folder import read_json

    index = read_json(path / PIPELINE_INDEX)
    return sorted(name for name in index if not name.startswith("_") and (path / name).is_dir())
