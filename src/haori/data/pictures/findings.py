"""What stands out once all pictures are known: their captions together, and augmentations that may hurt."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from haori.data.pictures.captions import full_caption, holds
from haori.data.pictures.listing import listed
from haori.data.pictures.row import PictureRow
from haori.data.readers import shorten

__all__ = ["CaptionFindings", "augmentation_notes", "caption_findings"]

_LISTED = 20
_SIDED = re.compile(
    r"\b(text|texts|writing|written|letters?|lettering|words?|signs?|logos?|watermark|signature|left|right)\b"
    r"|文字|ロゴ|看板|署名|左|右",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class CaptionFindings:
    """What captions have in common, and what is lost of them.

    Attributes:
        counts: Pictures by what was found of their captions.
        cut: Captions that are longer than the text encoder reads, each with what is cut off.
        notes: Sentences.
    """

    counts: dict[str, int]
    cut: tuple[str, ...]
    notes: tuple[str, ...]


def caption_findings(
    rows: Sequence[PictureRow], cut: Callable[[str], str], *, shared: str | None = None
) -> CaptionFindings:
    """Look at all captions as they are trained on, unshuffled.

    Args:
        rows: All pictures, regularisation pictures among them.
        cut: Returns what of a caption is longer than the text encoder reads; empty if nothing is.
        shared: The caption that pictures without one were given.
    """
    counts: Counter[str] = Counter()
    notes, lost = [], []
    for row in rows:
        if left := cut(full_caption(row.caption, row.augmentation)):
            lost.append(f"{row.origin}: the text encoder does not read the end: {left}")
    if lost:
        counts["longer than the text encoder reads"] = len(lost)
    shown = lost if len(lost) <= _LISTED else [*lost[:_LISTED], f"{len(lost) - _LISTED:,} more captions"]
    own = [row for row in rows if not row.prior and row.caption not in ("", shared)]
    alike = Counter(row.caption for row in own)
    if same := [caption for caption, count in alike.most_common() if count > 1]:
        counts["the same as another's"] = sum(alike[caption] for caption in same)
        told = [f"{shorten(caption, 60)!r} ({alike[caption]})" for caption in same]
        notes.append(
            f"Captions that several pictures share: {listed(told, 3)}. What differs between those pictures is learnt "
            "as chance; say it in the captions if it is to be called up by words."
        )
    if added := [row for row in own if row.augmentation.trigger and not holds(row.caption, row.augmentation.trigger)]:
        counts["without the trigger, which is put before them"] = len(added)
        if other := [row.origin for row in added if (row.augmentation.trigger or "").lower() in row.caption.lower()]:
            notes.append(
                f"Captions with the trigger in another spelling or inside another word: {listed(other, 3)}; write it "
                "in one way everywhere."
            )
    return CaptionFindings(dict(counts), tuple(shown), tuple(notes))


def augmentation_notes(rows: Sequence[PictureRow]) -> list[str]:
    """Return what to mind about pictures that are mirrored or coloured at random."""
    notes = []
    if flipped := [row for row in rows if row.augmentation.flip]:
        note = (
            "Pictures are mirrored half of the time (data.flip): writing is learnt as mirror writing, and what is not "
            "the same left and right, such as a parting or a logo, both ways."
        )
        if sided := [row.origin for row in flipped if _SIDED.search(row.caption)]:
            note += f" Captions that speak of such: {listed(sided, 3)}."
        notes.append(note)
    if any(row.augmentation.colour for row in rows):
        notes.append(
            "Colours are changed at random (data.colour), so the model learns that they do not matter: right for a "
            "shape, wrong for a style or a subject with colours of its own."
        )
    return notes
