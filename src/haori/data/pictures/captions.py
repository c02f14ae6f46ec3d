"""Captions: read from files beside pictures, and varied each time a picture is trained on."""

from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import DataError
from haori.data.pictures.row import Augmentation, PictureRow

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ENDINGS", "full_caption", "holds", "read_sidecar", "training_caption"]

ENDINGS = (".txt", ".caption")
_MAX_BYTES = 1 << 20


def training_caption(row: PictureRow, random: "np.random.Generator") -> str:
    """Draw the caption of one step: its parts shuffled behind those that are kept, the trigger first, or empty.

    The same draws are made whatever the caption is, so that one more word in one of them changes no other.
    """
    rules = row.augmentation
    dropped, seed = random.random() < rules.caption_dropout, random.integers(2**32)
    if dropped:
        return ""
    caption = row.caption
    if rules.shuffle_caption:
        import numpy as np

        parts = [part.strip() for part in caption.split(rules.caption_separator)]
        parts = [part for part in parts if part]
        kept, rest = parts[: rules.keep_tokens], parts[rules.keep_tokens :]
        if rules.trigger in rest:  # a part of its own: it goes in front
            rest.remove(rules.trigger)
        order = np.random.default_rng(seed).permutation(len(rest))
        caption = _joint(rules).join([*kept, *(rest[place] for place in order)])
    return full_caption(caption, rules)


def full_caption(caption: str, rules: Augmentation) -> str:
    """Return a caption with the trigger before it, unless it holds the trigger already."""
    if rules.trigger is None or holds(caption, rules.trigger):
        return caption
    return f"{rules.trigger}{_joint(rules)}{caption}" if caption else rules.trigger


def _joint(rules: Augmentation) -> str:
    return rules.caption_separator if rules.caption_separator.isspace() else f"{rules.caption_separator} "


def holds(caption: str, trigger: str) -> bool:
    """Say whether the trigger stands in a caption as words of its own, in the same spelling."""
    start = caption.find(trigger)
    while start >= 0:
        before, after = caption[start - 1 : start], caption[start + len(trigger) : start + len(trigger) + 1]
        if not before.isalnum() and not after.isalnum():
            return True
        start = caption.find(trigger, start + 1)
    return False


def read_sidecar(path: Path, origin: str) -> str:
    """Return the caption in a file, its lines without blank ones and without space around them.

    Raises:
        DataError: It is not text in UTF-8, or far too long; the message begins with `origin`.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{origin} cannot be read: {error.strerror or error}.") from None
    if len(raw) > _MAX_BYTES:
        raise DataError(f"{origin} has more than {_MAX_BYTES >> 20} MiB; that is no caption.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "it looks like UTF-16; " if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(
            f"{origin}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8 text; {hint}save the file as "
            "UTF-8."
        ) from None
    if "\0" in text:
        raise DataError(f"{origin} holds zero bytes; that is no caption. Save it as UTF-8 text.")
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())
