"""Pictures ready for training: read, checked, bucketed and split, with a report in which each is accounted for."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import DataError
from haori.core.hashing import hash_data, hash_file, hash_parts
from haori.data.pictures.findings import augmentation_notes, caption_findings
from haori.data.pictures.listing import listed
from haori.data.pictures.reading import Reading
from haori.data.pictures.report import BucketCount, PictureReport
from haori.data.pictures.row import PictureRow
from haori.data.pictures.section import PictureSection
from haori.data.pictures.split import hold_out

if TYPE_CHECKING:
    from rich.console import RenderableType

    from haori.core.records import DataReference

__all__ = ["PictureSplit", "read_pictures"]


@dataclass(frozen=True)
class PictureSplit:
    """Pictures to train on, regularisation pictures among them, and pictures held out."""

    train: Sequence[PictureRow]
    validation: Sequence[PictureRow]
    report: PictureReport

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a user should know of the reading."""
        report, notes = self.report, []
        for what, counts in (("left out", report.dropped), ("changed", report.changed)):
            if counts:
                notes.append(f"Pictures {what}: {', '.join(f'{count:,} {why}' for why, count in counts.items())}.")
        if report.captions:
            notes.append(f"Captions: {', '.join(f'{count:,} {what}' for what, count in report.captions.items())}.")
        if report.cut:
            notes.append(f"The first that is cut off is {report.cut[0]}")
        return (*notes, *report.notes)

    @property
    def refused(self) -> bool:
        """Say whether nothing can be trained on these pictures."""
        return self.report.refused

    def reference(self) -> "DataReference":
        """Return the short form that cards and runs keep."""
        return self.report.reference()

    def table(self) -> "RenderableType":
        """Return the whole report, for a terminal."""
        from haori.data.pictures.show import report_table

        return report_table(self.report)


def read_pictures(
    section: PictureSection,
    *,
    native_size: int,
    size_multiple: int,
    cut: Callable[[str], str],
    tolerant: bool = False,
) -> PictureSplit:
    """Read, check, bucket and split pictures.

    Args:
        section: Which pictures, and how.
        native_size: Side in pixels of the squares that the base was made for.
        size_multiple: What sides in pixels must divide by for this base.
        cut: Returns what of a caption is longer than the text encoder reads; empty if nothing is.
        tolerant: Go on after broken pictures and missing captions, and report them.

    Raises:
        DataError: The source cannot be found or read, a picture is broken or has no caption (unless `tolerant`), or
            nothing is left to train on.
        MissingExtraError: Pillow is not installed.
    """
    reading = Reading(section, native_size=native_size, size_multiple=size_multiple, tolerant=tolerant)
    main, apart = _sources(section, reading)
    reading.require_all()
    problems, refused = list(reading.problems), False
    try:
        train, validation, told = hold_out(section, main, apart, reading.likeness)
    except DataError as error:
        if not tolerant:
            raise
        train, validation, told, refused = main, [], [], True
        problems.append(str(error))
    own = [row for row in train if not row.prior]
    findings = caption_findings([*train, *validation], cut, shared=section.caption)
    notes = [*reading.notes, *findings.notes, *augmentation_notes(train), *_rights(section, reading), *told]
    report = PictureReport(
        source=section.path,
        layout="+".join(dict.fromkeys(reading.layouts)),
        hash=_hash(section, train, validation),
        read=reading.read_count,
        rows={"train": len(own), "validation": len(validation)}
        | ({"regularisation": len(train) - len(own)} if len(train) > len(own) else {}),
        steps=sum(row.repeats for row in train),
        dropped=dict(reading.dropped),
        changed=dict(Counter(note for row in (*train, *validation) for note in row.notes)),
        buckets=_buckets([*train, *validation]),
        captions={what: count for what, count in reading.captions.items() if count} | findings.counts,
        cut=findings.cut,
        refused=refused,
        problems=tuple(problems),
        notes=tuple(notes),
        licence=section.licence or _licence(reading),
        attribution=section.attribution,
    )
    return PictureSplit(train, validation, report)


def _sources(section: PictureSection, reading: Reading) -> tuple[list[PictureRow], list[PictureRow] | None]:
    """Read all sources: what is trained on, and what is held out, or None where no source says that."""
    main, apart = reading.read(section.path)
    if section.validation is not None:
        if apart:
            reading.dropped["held out by the set itself, while data.validation names other pictures"] += len(apart)
        apart = [row for part in reading.read(section.validation) for row in part]
    if section.regularisation is not None:
        main += [row for part in reading.read(section.regularisation, prior=True) for row in part]
    return main, apart if apart or section.validation is not None else None


def _licence(reading: Reading) -> str | None:
    """Return the licence that the sources state, where it is one."""
    found = set(reading.licences)
    return found.pop() if len(found) == 1 else None


def _rights(section: PictureSection, reading: Reading) -> list[str]:
    """Say what is known of rights in the pictures that a user should look at."""
    notes = []
    if section.licence is None and len(found := sorted(set(reading.licences))) > 1:
        notes.append(f"Licences that the pictures' own data state: {listed(found)}; data.licence can say one.")
    if reading.copyrights:
        told = listed([f"{notice} ({count:,})" for notice, count in reading.copyrights.most_common()], 3)
        notes.append(f"Pictures that carry a copyright notice: {told}; see that you may train on them.")
    return notes


def _buckets(rows: Sequence[PictureRow]) -> tuple[BucketCount, ...]:
    counts = Counter(row.bucket for row in rows)
    ordered = sorted(counts, key=lambda size: (size[0] / size[1], size))
    return tuple(BucketCount(width=size[0], height=size[1], pictures=counts[size]) for size in ordered)


def _hash(section: PictureSection, train: Sequence[PictureRow], validation: Sequence[PictureRow]) -> str:
    """Return the hash of everything that decides what is trained on."""
    names = {"path", "validation", "regularisation", "mask_folder", "licence", "attribution"}
    rows = [(row, "train") for row in train] + [(row, "validation") for row in validation]
    parts = (
        part
        for row, split in rows
        for part in (
            row.content_hash,
            row.caption,
            split,
            str((row.bucket, row.crop, row.repeats, row.weight, row.prior, row.augmentation)),
            hash_file(row.mask) if isinstance(row.mask, Path) else str(row.mask),
        )
    )
    return hash_data([hash_parts(parts), section.model_dump(mode="json", exclude=names)])
