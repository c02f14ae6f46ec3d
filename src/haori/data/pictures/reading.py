"""From a data section to rows of pictures: everything that was left out or changed is counted, and said."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from haori.core.errors import DataError
from haori.core.user_path import user_path
from haori.data.pictures.buckets import bucket_of, cover, sizes_for
from haori.data.pictures.inspection import Inspected, inspect_picture
from haori.data.pictures.likeness import Likeness
from haori.data.pictures.listing import PictureFile, listed
from haori.data.pictures.masks import check_mask, masks_in
from haori.data.pictures.opening import require_pillow
from haori.data.pictures.row import ALPHA, Augmentation, Mask, PictureRow
from haori.data.pictures.section import PictureSection
from haori.data.pictures.sources import list_pictures
from haori.data.progress import tracked

__all__ = ["Reading"]

_LISTED = 20
_KEPT = 2 / 3


class Reading:
    """One reading of all sources of a section, and what it met.

    Attributes:
        read_count: Pictures that the sources list.
        dropped: Pictures left out, by reason.
        captions: What was found of captions, counted.
        problems: What stands in the way of training, as sentences.
        notes: What else a user should know.
        layouts: Of the sources.
        licences: That the sources state.
        copyrights: Notices that pictures carry, counted.
    """

    def __init__(
        self,
        section: PictureSection,
        *,
        native_size: int,
        size_multiple: int,
        tolerant: bool,
    ) -> None:
        require_pillow()
        self.read_count = 0
        self.dropped: Counter[str] = Counter()
        self.captions: Counter[str] = Counter()
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.layouts: list[str] = []
        self.licences: list[str] = []
        self.copyrights: Counter[str] = Counter()
        self._section, self._tolerant = section, tolerant
        self._base = (native_size, size_multiple)
        self._sizes: dict[PictureSection, list[tuple[int, int]]] = {}
        self._masks: dict[str, dict[str, Path]] = {}
        self._likeness: dict[str, Likeness] = {}
        self._broken: list[str] = []
        self._missing: list[str] = []
        self._small: list[str] = []
        self._sizes_of(section)

    def likeness(self, row: PictureRow) -> Likeness:
        """Return how a picture that was read looks."""
        return self._likeness[row.content_hash]

    def read(self, given: str, *, prior: bool = False) -> tuple[list[PictureRow], list[PictureRow]]:
        """Read one source.

        Returns:
            Its pictures to train on, and those that it keeps for validation itself.

        Raises:
            DataError: It cannot be found or understood at all.
        """
        listing = list_pictures(self._section, given, prior=prior)
        self.layouts.append(listing.layout)
        self.licences += listing.licences
        self._note(listing.notes)
        for problem in listing.problems:
            self.read_count += 1
            self.dropped["broken"] += 1
            self._broken.append(str(problem))
        if listing.ignored:
            self.notes.append(f"Files that are no pictures and not read: {listed(listing.ignored)}.")
        files = listing.files
        if self._section.max_rows is not None and len(files) > self._section.max_rows:
            self.notes.append(
                f"Of the {len(files):,} pictures of {given!r} the first {self._section.max_rows:,} were read "
                "(data.max_rows)."
            )
            files = files[: self._section.max_rows]
        seen: set[tuple[str, str, bool]] = set()
        rows = [self._row(file, seen) for file in tracked(files, "Reading pictures", total=len(files), every=8)]
        kept = [(row, file.held_out) for row, file in zip(rows, files, strict=True) if row is not None]
        self._note_masks(files, [row for row, _ in kept])
        return [row for row, held_out in kept if not held_out], [row for row, held_out in kept if held_out]

    def require_all(self) -> None:
        """Refuse pictures that are broken or have no caption; a tolerant reading lists them instead.

        Raises:
            DataError: There are such, and the reading is not tolerant.
        """
        trouble = list(self._broken)
        if self._missing:
            trouble.append(
                f"{len(self._missing):,} picture{'s have' if len(self._missing) > 1 else ' has'} no caption "
                f"({listed(self._missing)}); "
                "write captions to files of the same names ending in .txt (`haori data caption` does it with a model), "
                "give all of them one with --set data.caption=..., or a trigger with --set data.trigger=..."
            )
        if self._small:
            trouble.append(
                f"{len(self._small):,} picture{'s are' if len(self._small) > 1 else ' is'} smaller than needed "
                f"({self._small[0]}); give larger ones, or set data.too_small to enlarge or drop."
            )
        if not trouble:
            return
        if not self._tolerant:
            more = f" ({len(trouble) - 1} more like this; `haori data check` lists them)" if len(trouble) > 1 else ""
            raise DataError(trouble[0] + more)
        self.problems += trouble[:_LISTED]
        if len(trouble) > _LISTED:
            self.problems.append(f"{len(trouble) - _LISTED:,} more that are not listed.")

    def _note(self, notes: Sequence[str]) -> None:
        self.notes += [note for note in notes if note not in self.notes]

    def _row(self, file: PictureFile, earlier: set[tuple[str, str, bool]]) -> PictureRow | None:
        """Return a row, or None and the reason counted."""
        self.read_count += 1
        section = file.section
        try:
            caption = file.caption()
            seen = inspect_picture(file.file, file.origin, smart=section.crop == "smart")
            mask = self._mask(file, seen)
        except DataError as error:
            self.dropped["broken"] += 1
            self._broken.append(str(error))
            return None
        rules = Augmentation.of(section)
        if file.prior:
            rules = replace(rules, trigger=None)
        caption = self._caption(file, caption, rules)
        if caption is None:
            self.dropped["without a caption"] += 1
            self._missing.append(file.origin)
            return None
        key = (seen.content_hash, caption, file.prior)
        if key in earlier:
            self.dropped["exact duplicates"] += 1
            return None
        bucket = bucket_of(seen.width, seen.height, self._sizes_of(section))
        notes = list(seen.notes)
        if seen.width < bucket[0] or seen.height < bucket[1]:
            if section.too_small == "error":
                self._small.append(f"{file.origin}: {seen.width} x {seen.height} for {bucket[0]} x {bucket[1]}")
            if section.too_small != "enlarge":
                self.dropped["too small"] += 1
                return None
            notes.append("enlarged")
        crop = cover(seen.width, seen.height, bucket, seen.centre)
        if bucket[0] * bucket[1] < _KEPT * crop.scaled[0] * crop.scaled[1]:
            notes.append("more than a third cut off")
        earlier.add(key)
        self._likeness[seen.content_hash] = seen.likeness
        if seen.copyright is not None:
            self.copyrights[seen.copyright] += 1
        return PictureRow(
            origin=file.origin, file=file.file, caption=caption, content_hash=seen.content_hash, width=seen.width,
            height=seen.height, bucket=bucket, crop=crop,
            repeats=file.repeats * section.repeats, weight=file.weight * (section.prior_weight if file.prior else 1.0),
            prior=file.prior, mask=mask, augmentation=rules, notes=tuple(notes),
        )  # fmt: skip

    def _caption(self, file: PictureFile, own: str | None, rules: Augmentation) -> str | None:
        """Return the caption: a picture's own, else everybody's, else its folder's, else nothing but the trigger."""
        if own is not None:
            self.captions["of several lines, which are joined"] += "\n" in own
            return own.replace("\n", " ")
        shared = None if file.prior else file.section.caption
        if shared is not None:
            self.captions["from data.caption"] += 1
            return shared
        if file.fallback is not None:
            self.captions["from the folder's name"] += 1
            return file.fallback
        if rules.trigger is not None:
            self.captions["the trigger alone"] += 1
            return ""
        return None

    def _sizes_of(self, section: PictureSection) -> list[tuple[int, int]]:
        if section not in self._sizes:
            self._sizes[section] = sizes_for(section, *self._base)
            if section.masks == "files" and section.mask_folder is not None:
                self._masks[section.mask_folder] = masks_in(user_path(section.mask_folder))
        return self._sizes[section]

    def _mask(self, file: PictureFile, seen: Inspected) -> Mask | None:
        section = file.section
        if section.masks == "alpha":
            return ALPHA if seen.has_alpha else None
        if section.masks == "none":
            return None
        mask = file.mask
        if section.mask_folder is not None:
            mask = self._masks[section.mask_folder].get(file.file.stem)
        if mask is not None:
            check_mask(mask, file.origin, (seen.width, seen.height), section.unmasked_weight)
        return mask

    def _note_masks(self, files: Sequence[PictureFile], rows: Sequence[PictureRow]) -> None:
        if unused := sum(file.mask is not None and file.section.masks == "none" for file in files):
            self.notes.append(f"Mask files beside pictures, not used: {unused:,}; --set data.masks=files uses them.")
        masked = {file.origin for file in files if file.section.masks != "none" and not file.prior}
        if without := [row.origin for row in rows if row.mask is None and row.origin in masked]:
            self.notes.append(f"Pictures without a mask, which count all over: {listed(without)}.")
