"""Which files are masks of which pictures, as OneTrainer, ai-toolkit and kohya's users name them."""

from collections.abc import Sequence
from pathlib import Path

from haori.core.errors import DataError
from haori.data.folder_files import entries_of
from haori.data.pictures.opening import EXTENSIONS, open_mask

__all__ = ["check_mask", "masks_in", "pair_masks"]

_ENDS = ("-masklabel", "-mask", "_mask")
_MOST_STRETCH = 1.05


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
        DataError: There is no such folder, it has two for one name, or far too many files.
    """
    if not folder.is_dir():
        raise DataError(f"data.mask_folder: there is no folder {str(folder)!r}.")
    found: dict[str, Path] = {}
    for path in sorted(entries_of(folder, str(folder), recursive=False)):
        if path.suffix.lower() not in EXTENSIONS or path.name.startswith("."):
            continue
        name = _without_end(path.stem)
        if name in found:
            raise DataError(f"data.mask_folder: {found[name].name} and {path.name} are masks for one picture.")
        found[name] = path
    return found


def check_mask(mask: Path, origin: str, size: tuple[int, int], unmasked_weight: float) -> None:
    """Refuse a mask that cannot be put over its picture, or leaves nothing of it.

    Args:
        mask: Its file.
        origin: What people call the picture.
        size: Width and height of the picture.
        unmasked_weight: Weight of the loss where the mask is black.

    Raises:
        DataError: It cannot be read, has another shape than its picture, or is black all over.
    """
    image = open_mask(mask, str(mask))
    factors = [own / whole for own, whole in zip(image.size, size, strict=True)]
    if max(factors) > _MOST_STRETCH * min(factors):
        raise DataError(
            f"{mask}: the mask is {image.width} x {image.height}, another shape than the {size[0]} x {size[1]} of "
            f"{origin}; cut both alike."
        )
    if unmasked_weight == 0 and image.getextrema()[1] == 0:
        raise DataError(
            f"{mask}: the mask is black all over, so that nothing of {origin} would be learnt; paint white what is to "
            "be, or set data.unmasked_weight."
        )


def _without_end(stem: str) -> str:
    return next((stem[: -len(end)] for end in _ENDS if stem.endswith(end)), stem)
