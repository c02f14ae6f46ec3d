"""Which pictures are held out for validation: by content, so that near-duplicates are never on both sides.

Each picture has a point in [0, 1) made from the hash of its bytes (see `haori.data.split`). A group of pictures that
look alike moves as one and has the greatest point of its members: a picture that joins a group can bring it back to
training, and never takes it out of there.
"""

import re
from collections.abc import Callable, Sequence

from haori.core.errors import DataError
from haori.data.pictures.likeness import Likeness, group_alike
from haori.data.pictures.row import PictureRow
from haori.data.pictures.section import PictureSection
from haori.data.split import choose_validation, point

__all__ = ["hold_out"]

_FEW = 10
_SHOWN = 3


def hold_out(
    section: PictureSection,
    rows: Sequence[PictureRow],
    apart: Sequence[PictureRow] | None,
    likeness: Callable[[PictureRow], Likeness],
) -> tuple[list[PictureRow], list[PictureRow], list[str]]:
    """Return the pictures to train on, those held out, and what a user should know of it.

    Regularisation pictures among the rows are never held out.

    Args:
        section: With the share to hold out.
        rows: All pictures.
        apart: Pictures that were given for validation; None if none were.
        likeness: How each of them looks.

    Raises:
        DataError: Nothing would be left on one of the two sides.
    """
    import numpy as np

    own = [row for row in rows if not row.prior]
    everything = [*own, *(apart or ())]
    groups = group_alike([likeness(row) for row in everything])
    notes = _told(everything, groups)
    if not own:
        raise DataError(f"{section.path!r} has no picture to learn from.")
    if apart is not None:
        held = [row for row in apart if not row.prior]
        if not held:
            raise DataError(f"{section.validation!r}, given as data.validation, has no picture.")
        if leaks := sorted(set(groups[: len(own)]) & set(groups[len(own) :])):
            notes.append(
                f"Pictures of the validation set that are also among the training pictures, or nearly: {len(leaks)}; "
                "the validation loss flatters."
            )
        return list(rows), held, notes
    if section.validation_share == 0:
        return list(rows), [], [*notes, "No picture is held out (data.validation_share=0)."]
    if len(set(groups)) == 1:
        what = "one picture" if len(own) == 1 else f"{len(own)} pictures that look alike"
        raise DataError(
            f"{section.path!r} has {what}; to hold one out for validation, add other pictures, or train without "
            "validation: --set data.validation_share=0."
        )
    points = np.array([point(row.content_hash) for row in own])
    whole = np.zeros(len(own))
    np.maximum.at(whole, groups, points)
    chosen, note = choose_validation(whole[groups], whole[groups], section.validation_share)
    held = [row for row, out in zip(own, chosen, strict=True) if out]
    if len(own) <= _FEW:
        notes.append(
            f"Of {len(own)} pictures {len(held)} {'is' if len(held) == 1 else 'are'} held out for validation: "
            f"{', '.join(row.origin for row in held)}. A loss on so few says little; to train on all, "
            "--set data.validation_share=0."
        )
    elif note:
        notes.append(re.sub(r"\brow(s?)\b", r"picture\1", note))
    out = set(map(id, held))
    return [row for row in rows if id(row) not in out], held, notes


def _told(rows: Sequence[PictureRow], groups: Sequence[int]) -> list[str]:
    members: dict[int, list[str]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(row.origin)
    alike = [names for names in members.values() if len(names) > 1]
    if not alike:
        return []
    shown = "; ".join(", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "") for names in alike[:_SHOWN])
    return [
        f"Pictures that look nearly alike: {sum(map(len, alike))} in {len(alike)} "
        f"group{'s' if len(alike) > 1 else ''} ({shown}{' ...' if len(alike) > _SHOWN else ''}); they count more than "
        "others, and are kept on one side of the validation split."
    ]
