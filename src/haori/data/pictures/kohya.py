"""kohya's dataset TOML (`--dataset_config` of sd-scripts): subsets with keys that fall back to datasets and general.

What a subset says goes before the recipe; what it leaves out is the recipe's. Keys without a meaning here are named.
"""

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from haori.core.errors import DataError, nearest
from haori.data.pictures.folder import list_folder
from haori.data.pictures.foreign import UnusedKeys, find_beside, joined, section_with, value_of
from haori.data.pictures.listing import Listing, PictureFile
from haori.data.pictures.opening import EXTENSIONS
from haori.data.pictures.section import PictureSection

__all__ = ["list_kohya"]

_LIMIT_BYTES = 4 << 20
_METADATA_LIMIT_BYTES = 256 << 20
_SAME = {
    "num_repeats": "repeats", "shuffle_caption": "shuffle_caption", "keep_tokens": "keep_tokens",
    "caption_separator": "caption_separator", "flip_aug": "flip", "caption_extension": "caption_extension",
    "enable_bucket": "buckets", "bucket_reso_steps": "bucket_step",
}  # fmt: skip
_NUMBERS = {"caption_dropout_rate": "caption_dropout"}
_OWN = {"image_dir", "metadata_file", "is_reg", "class_tokens", "caption_prefix", "caption_suffix", "resolution",
        "random_crop", "color_aug", "alpha_mask", "conditioning_data_dir", "subsets"}  # fmt: skip
_COLOUR = 0.2
_LARGEST = 1 << 20
_UNUSED = {
    "batch_size": "set the batch in the training section",
    "network_multiplier": "there is no such factor",
    "min_bucket_reso": "data.max_aspect bounds the shapes",
    "max_bucket_reso": "data.max_aspect bounds the shapes",
    "bucket_no_upscale": "data.too_small says what happens to small pictures",
    "skip_image_resolution": "data.too_small=drop leaves small pictures out",
    "resize_interpolation": "pictures are scaled by Lanczos",
    "face_crop_aug_range": "data.crop=smart crops around what draws the eye",
    "keep_tokens_separator": "keep_tokens counts parts from the front",
    "secondary_separator": "captions are parted once",
    "enable_wildcard": "captions are taken as they are",
    "caption_dropout_every_n_epochs": "caption_dropout_rate drops captions",
    "caption_tag_dropout_rate": "only whole captions are dropped",
    "token_warmup_min": "captions are whole from the first step",
    "token_warmup_step": "captions are whole from the first step",
    "cache_info": "nothing to cache",
    "custom_attributes": "they have no meaning here",
}


def list_kohya(path: Path, given: str, section: PictureSection, *, prior: bool = False) -> Listing:
    """List the pictures of a dataset TOML.

    Raises:
        DataError: It is no such file, has unknown keys, or names folders that are not there.
    """
    config = _load(path, given)
    unused = UnusedKeys()
    general = _table(config.get("general", {}), f"{given}: general")
    if stray := sorted(set(config) - {"general", "datasets"}):
        raise DataError(f"{given}: {stray[0]!r} is not a part of a kohya dataset; it has general and datasets.")
    datasets = config.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise DataError(f"{given} has no [[datasets]]; a kohya dataset TOML lists its folders under them.")
    listings = []
    for number, dataset in enumerate(datasets, start=1):
        where = f"{given}: datasets {number}"
        subsets = _table(dataset, where).get("subsets")
        if not isinstance(subsets, list) or not subsets:
            raise DataError(f"{where} has no [[datasets.subsets]] with an image_dir.")
        for place, subset in enumerate(subsets, start=1):
            at = f"{where}, subset {place}"
            keys = {**general, **dataset, **_table(subset, at)}
            keys.pop("subsets", None)
            listings.append(_subset(keys, path, at, section, unused, prior=prior))
    return joined("kohya dataset", listings, unused.notes())


def _load(path: Path, given: str) -> dict[str, Any]:
    if path.stat().st_size > _LIMIT_BYTES:
        raise DataError(f"{given!r} has more than {_LIMIT_BYTES >> 20} MiB; that is no kohya dataset TOML.")
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{given!r} is not readable as TOML ({error}).") from None


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be a table of keys, not {type(value).__name__}.")
    for key in value:
        if key not in (known := {*_SAME, *_NUMBERS, *_OWN, *_UNUSED}):
            hint = nearest(key, known) or "the documentation of sd-scripts lists them."
            raise DataError(f"{where}: {key!r} is no key of a kohya dataset; {hint}")
    return value


def _subset(
    keys: Mapping[str, Any], path: Path, where: str, section: PictureSection, unused: UnusedKeys, *, prior: bool
) -> Listing:
    for key, reason in _UNUSED.items():
        unused.add(key, keys.get(key), reason)
    own = section_with(section, _section_keys(keys, path, where, unused), where)
    if "image_dir" not in keys and "metadata_file" not in keys:
        raise DataError(f"{where} has no image_dir.")
    image_dir = value_of(keys, "image_dir", str, where, "")
    folder = find_beside(image_dir, path, where) if "image_dir" in keys else path.parent
    if not folder.is_dir():
        raise DataError(f"{where}: image_dir {keys['image_dir']!r} is no folder.")
    is_prior = prior or value_of(keys, "is_reg", bool, where, False)
    listing = list_folder(folder, str(folder), own, prior=is_prior, recursive=False, numbered=False)
    if "metadata_file" in keys:
        file = find_beside(value_of(keys, "metadata_file", str, where, ""), path, where)
        listing = replace(listing, files=_from_metadata(file, folder, own, is_prior), ignored=[])
    fallback = value_of(keys, "class_tokens", str, where, "") or None
    before, after = (value_of(keys, key, str, where, "") for key in ("caption_prefix", "caption_suffix"))
    return replace(
        listing,
        files=[
            replace(file, fallback=fallback, caption=_surrounded(file.caption, before, after)) for file in listing.files
        ],
    )


def _section_keys(keys: Mapping[str, Any], path: Path, where: str, unused: UnusedKeys) -> dict[str, Any]:
    found = {ours: keys[theirs] for theirs, ours in _SAME.items() if theirs in keys}
    found |= {ours: value_of(keys, theirs, float, where, 0.0) for theirs, ours in _NUMBERS.items() if theirs in keys}
    if "resolution" in keys:
        found["resolution"] = _side(keys["resolution"], where)
    if value_of(keys, "random_crop", bool, where, False):
        found["crop"] = "random"
    if value_of(keys, "color_aug", bool, where, False):
        found["colour"] = _COLOUR
        unused.add("color_aug", True, f"data.colour={_COLOUR:g} takes its place")
    if value_of(keys, "alpha_mask", bool, where, False):
        found["masks"] = "alpha"
    if masks := value_of(keys, "conditioning_data_dir", str, where, ""):
        found |= {"masks": "files", "mask_folder": str(find_beside(masks, path, where))}
    return found


def _side(value: Any, where: str) -> int:
    """Return the side of the square of a resolution."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side < _LARGEST for side in sides):
        raise DataError(f"{where}: resolution {value!r} must be a number of pixels, or [width, height].")
    if sides[0] != sides[1]:
        raise DataError(
            f"{where}: resolution {value!r} is no square; give the side of a square of that area, such as "
            f"{round((sides[0] * sides[1]) ** 0.5 / 64) * 64 or 64}: buckets keep the shapes."
        )
    return int(sides[0])


def _surrounded(read: Callable[[], str | None], before: str, after: str) -> Callable[[], str | None]:
    """Return what reads a caption with the words before and after that a subset gives all of its captions."""
    if not before and not after:
        return read

    def whole() -> str | None:
        caption = read()
        return None if caption is None else " ".join(part for part in (before, caption, after) if part)

    return whole


def _from_metadata(file: Path, folder: Path, section: PictureSection, prior: bool) -> list[PictureFile]:
    """Return the pictures of a metadata file of the fine-tuning scripts: names or paths with captions and tags."""
    if file.stat().st_size > _METADATA_LIMIT_BYTES:
        raise DataError(f"{file} has more than {_METADATA_LIMIT_BYTES >> 20} MiB.")
    try:
        rows = json.loads(file.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not readable as JSON ({error}).") from None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise DataError(f"{file} must hold an object with an object for each picture.")
    return [
        PictureFile(str(path), path, _tagged(row, section.caption_separator), section, prior=prior)
        for path, row in ((_picture(folder, name, file), row) for name, row in rows.items())
    ]


def _picture(folder: Path, name: str, file: Path) -> Path:
    for path in (folder / name, *(folder / f"{name}{end}" for end in sorted(EXTENSIONS))):
        if path.is_file():
            return path
    raise DataError(f"{file}: there is no picture {name!r} in {folder}.")


def _tagged(row: Mapping[str, Any], separator: str) -> Callable[[], str | None]:
    parts = [str(row[key]) for key in ("caption", "tags") if row.get(key)]
    return lambda: f"{separator} ".join(parts) or None
