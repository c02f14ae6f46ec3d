"""Which files are masks of which pictures, as OneTrainer, ai-toolkit and kohya's users name them."""

from collections.abc import Sequence
from pathlib import Path

from haori.core.errors import DataError
from haori.data.pictures.opening import EXTENSIONS

__all__ = ["masks_in", "pair_masks"]

_ENDS = ("-masklabel", "-mask", "_mask")


def pair_masks(pictures: Sequence[Path]) -> dict[Path, Path]:
    """Return the masks that are beside pictures: each picture that has one, with it."""
    owners: dict[tuple[Path, str], list[Path]] = {}
    for path in pictures:
        owners.setdefault((path.parent, path.stem), []).append(path)
    return {
        owner: path
        for path in pictures
        if (stem := _without_end(path.stem)) != path.stem
        for owner in owners.get((path.parent, stem), ())
    }


def masks_in(folder: Path) -> dict[str, Path]:
    """Return the masks of a folder of masks, by the name of the picture without its ending.

    Raises:
        DataError: There is no such folder, or it has two for one name.
    """
    if not folder.is_dir():
        raise DataError(f"data.mask_folder: there is no folder {str(folder)!r}.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in EXTENSIONS or path.name.startswith("."):
            continue
        name = _without_end(path.stem)
        if name in found:
            raise DataError(f"data.mask_folder: {found[name].name} and {path.name} are masks for one picture.")
        found[name] = path
    return found


def _without_end(stem: str) -> str:
    return next((stem[: -len(end)] for end in _ENDS if stem.endswith(end)), stem)
