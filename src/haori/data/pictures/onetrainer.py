"""OneTrainer's concepts: a JSON list of folders with their own captions, repeats, weights and augmentations.

Also read where they are part of a whole configuration. What a concept says goes before the recipe; what has no meaning
here is named.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from haori.core.errors import DataError, nearest
from haori.data.pictures.captions import read_sidecar
from haori.data.pictures.folder import list_folder
from haori.data.pictures.foreign import UnusedKeys, find_beside, joined, section_with, value_of
from haori.data.pictures.listing import Listing, listed
from haori.data.pictures.section import PictureSection
from haori.data.readers import shorten

__all__ = ["is_concepts", "list_concepts"]

_LIMIT_BYTES = 64 << 20
_LARGEST = 1e6
_OWN = {
    "__version", "name", "path", "seed", "enabled", "validation_concept", "type", "include_subdirectories", "balancing",
    "repeats", "balancing_strategy", "loss_weight", "image", "text", "concept_stats",
}  # fmt: skip
_UNUSED = {
    "image_variations": "pictures are varied anew each time",
    "text_variations": "captions are varied anew each time",
}
_IMAGE_UNUSED = {
    "enable_crop_jitter": "data.crop=random crops at random",
    "enable_fixed_flip": "mirror the files themselves",
    "enable_random_rotate": "pictures are not turned",
    "enable_fixed_rotate": "pictures are not turned",
    "enable_random_brightness": "data.colour varies colours",
    "enable_fixed_brightness": "data.colour varies colours",
    "enable_random_contrast": "data.colour varies colours",
    "enable_fixed_contrast": "data.colour varies colours",
    "enable_random_saturation": "data.colour varies colours",
    "enable_fixed_saturation": "data.colour varies colours",
    "enable_random_hue": "data.colour varies colours",
    "enable_fixed_hue": "data.colour varies colours",
    "enable_random_circular_mask_shrink": "masks are used as they are",
    "enable_random_mask_rotate_crop": "masks are used as they are",
}
_IMAGE_OWN = {
    "__version", "enable_random_flip", "enable_resolution_override", "resolution_override", "random_rotate_max_angle",
    "random_brightness_max_strength", "random_contrast_max_strength", "random_saturation_max_strength",
    "random_hue_max_strength",
}  # fmt: skip
_TEXT_UNUSED = {
    "tag_dropout_enable": "only whole captions are dropped, by data.caption_dropout",
    "caps_randomize_enable": "captions keep their capitals",
}
_TEXT_OWN = {
    "__version", "prompt_source", "prompt_path", "enable_tag_shuffling", "tag_delimiter", "keep_tags_count",
    "tag_dropout_mode", "tag_dropout_probability", "tag_dropout_special_tags_mode", "tag_dropout_special_tags",
    "tag_dropout_special_tags_regex", "caps_randomize_mode", "caps_randomize_probability", "caps_randomize_lowercase",
}  # fmt: skip


def is_concepts(path: Path) -> bool:
    """Say whether a JSON file holds concepts."""
    try:
        return path.stat().st_size <= _LIMIT_BYTES and _concepts(json.loads(path.read_text("utf-8-sig"))) is not None
    except (OSError, ValueError, RecursionError):
        return False


def _concepts(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, dict):
        value = value.get("concepts")
    if isinstance(value, list) and value and all(isinstance(item, dict) and "path" in item for item in value):
        return value
    return None


def list_concepts(path: Path, given: str, section: PictureSection, *, prior: bool = False) -> Listing:
    """List the pictures of a concepts file.

    Raises:
        DataError: It has unknown keys, or names folders that are not there.
    """
    concepts = _concepts(json.loads(path.read_text("utf-8-sig")))
    assert concepts is not None, "the caller has asked is_concepts"
    unused, listings, off = UnusedKeys(), [], []
    for number, concept in enumerate(concepts, start=1):
        where = f"{given}: concept {concept.get('name') or number}"
        _known(concept, {*_OWN, *_UNUSED}, where)
        if concept.get("enabled") is False:
            off.append(str(concept.get("name") or number))
            continue
        listings.append(_concept(concept, path, where, section, unused, prior=prior))
    notes = unused.notes()
    if off:
        notes.append(f"Concepts that are switched off, not read: {listed(off)}.")
    if not listings:
        raise DataError(f"{given!r} has no concept that is switched on.")
    return joined("OneTrainer concepts", listings, notes)


def _known(keys: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in keys:
        if key not in known:
            hint = nearest(key, known) or "this version of the file is not known."
            raise DataError(f"{where}: {key!r} is no key of a concept; {hint}")


def _concept(
    concept: Mapping[str, Any], path: Path, where: str, section: PictureSection, unused: UnusedKeys, *, prior: bool
) -> Listing:
    image, text = (_part(concept, part, where) for part in ("image", "text"))
    _known(image, {*_IMAGE_OWN, *_IMAGE_UNUSED}, f"{where}: image")
    _known(text, {*_TEXT_OWN, *_TEXT_UNUSED}, f"{where}: text")
    for key, reason in _UNUSED.items():
        if concept.get(key, 1) not in (1, None):
            unused.add(key, concept[key], reason)
    for part, reasons in ((image, _IMAGE_UNUSED), (text, _TEXT_UNUSED)):
        for key, reason in reasons.items():
            unused.add(key, part.get(key), reason)
    folder = find_beside(value_of(concept, "path", str, where, ""), path, where)
    if not folder.is_dir():
        raise DataError(f"{where}: {concept['path']!r} is no folder.")
    own = section_with(section, _section_keys(image, text, where), where)
    recursive = value_of(concept, "include_subdirectories", bool, where, False)
    kind = value_of(concept, "type", str, where, "STANDARD")
    is_prior = prior or kind == "PRIOR_PREDICTION"
    listing = list_folder(folder, str(folder), own, prior=is_prior, recursive=recursive, numbered=False)
    read = _caption_source(text, path, where)
    wanted = _repeats(concept, len(listing.files), where)
    number = max(1, round(wanted))
    held_out = value_of(concept, "validation_concept", bool, where, False) or kind == "VALIDATION"
    weight = value_of(concept, "loss_weight", float, where, 1.0)
    if not 0 < weight < _LARGEST:
        raise DataError(f"{where}: loss_weight must be a number above 0, not {weight:g}.")
    files = [
        replace(
            file, caption=read(file.file) if read else file.caption, repeats=number,
            weight=weight, held_out=held_out,
        )
        for file in listing.files
    ]  # fmt: skip
    notes = [*listing.notes]
    if abs(wanted - number) > 1e-6:
        notes.append(f"{where}: each picture comes {number} times in an epoch; the file asks for {wanted:.3g} times.")
    return replace(listing, files=files, notes=notes)


def _part(concept: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    part = concept.get(name) or {}
    if not isinstance(part, dict):
        raise DataError(f"{where}: {name} must hold keys, not {shorten(part, 60)!r}.")
    return part


def _section_keys(image: Mapping[str, Any], text: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {
        ours: part[theirs]
        for part, theirs, ours in (
            (image, "enable_random_flip", "flip"),
            (text, "enable_tag_shuffling", "shuffle_caption"),
            (text, "tag_delimiter", "caption_separator"),
            (text, "keep_tags_count", "keep_tokens"),
        )
        if part.get(theirs) is not None
    }
    if value_of(image, "enable_resolution_override", bool, where, False):
        value = str(image.get("resolution_override", ""))
        if not re.fullmatch(r"\s*[1-9][0-9]{0,5}\s*", value):
            raise DataError(f"{where}: resolution_override {shorten(value, 60)!r} must be one number of pixels.")
        found["resolution"] = int(value)
    return found


def _caption_source(text: Mapping[str, Any], path: Path, where: str) -> Callable[[Path], Callable[[], str]] | None:
    """Return what gives a picture its caption; None for files beside the pictures."""
    source = value_of(text, "prompt_source", str, where, "sample")
    if source == "sample":
        return None
    if source == "filename":
        return lambda file: lambda: file.stem
    if source != "concept":
        raise DataError(f"{where}: prompt_source {source!r} must be sample, concept or filename.")
    file = find_beside(value_of(text, "prompt_path", str, where, ""), path, f"{where}: prompt_path")
    if not file.is_file():
        raise DataError(f"{where}: prompt_path {str(file)!r} is no file.")
    caption = read_sidecar(file, str(file))
    if (lines := len(caption.splitlines())) != 1:
        raise DataError(
            f"{where}: {file.name} has {lines} lines to draw captions from; give one line, or each picture a caption "
            "file of its own."
        )
    return lambda _: lambda: caption


def _repeats(concept: Mapping[str, Any], pictures: int, where: str) -> float:
    """Return how often each picture is asked to come in an epoch."""
    value = value_of(concept, "balancing", float, where, value_of(concept, "repeats", float, where, 1.0))
    if not 0 < value < _LARGEST:
        raise DataError(f"{where}: balancing must be a number above 0, not {value:g}.")
    if value_of(concept, "balancing_strategy", str, where, "REPEATS") == "SAMPLES":
        value = value / max(1, pictures)
    return value
