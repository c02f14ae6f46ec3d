"""The pictures that drawn ones are held against: those given, and those that the adapter was trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError, InputError
from haori.data.pictures import PictureRow, PictureSection, read_pictures
from haori.tasks.recipe import kept_recipe

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.core.records import AdapterCard, DataReference
    from haori.data.pictures import PictureSplit

__all__ = ["PictureData", "read_own_pictures", "read_picture_data", "require_pictures"]

_TASKS = frozenset({"text_to_image", "image"})


@dataclass(frozen=True)
class PictureData:
    """Pictures to hold drawn ones against.

    Attributes:
        rows: Those that were given.
        training: Those that were trained on; the given ones where these are not known.
        reference: Identity of the given ones.
        notes: What a reader should know of both.
    """

    rows: tuple[PictureRow, ...]
    training: tuple[PictureRow, ...]
    reference: "DataReference"
    notes: tuple[str, ...]


def require_pictures(card: "AdapterCard", name: str) -> None:
    """Refuse an adapter that is not for pictures.

    Raises:
        InputError: It is one.
    """
    if card.task not in _TASKS:
        raise InputError(f"{name!r} was trained for {card.task}, and draws no pictures.")


def read_picture_data(card: "AdapterCard", base: "Base", section: PictureSection) -> PictureData:
    """Read the pictures given, and those on the adapter's card where they are still there.

    Args:
        card: Of the adapter; the trigger of its recipe is put before captions where the section has none.
        base: What draws.
        section: The pictures given.

    Raises:
        DataError: The pictures given cannot be read.
    """
    recipe: Any = kept_recipe(card)
    of_training: PictureSection | None = None if recipe is None else recipe.data
    if section.trigger is None and of_training is not None:
        section = section.model_copy(update={"trigger": of_training.trigger})
    given = read_own_pictures(base, section.model_copy(update={"validation_share": 0.0}))
    rows = _own(given)
    if len(rows) < 2:
        raise DataError(f"{section.path!r} holds {len(rows)} picture; two or more are needed to measure against.")
    told = [note for note in given.notes if "held out" not in note]  # nothing is, here
    trained = _trained_on(base, of_training, card)
    if trained is None:
        note = (
            "The pictures that the adapter was trained on are not at hand as they were, so copies are looked for among "
            f"the {len(rows):,} pictures given."
        )
        return PictureData(rows, rows, given.reference(), (*told, note))
    shared = {row.content_hash for row in rows} & {row.content_hash for row in trained}
    if shared:
        told.append(
            f"The adapter was trained on {len(shared):,} of the {len(rows):,} pictures given; to be near them is what "
            "it was trained for, and says nothing of other pictures."
        )
    return PictureData(rows, trained, given.reference(), tuple(told))


def _trained_on(base: "Base", section: PictureSection | None, card: "AdapterCard") -> tuple[PictureRow, ...] | None:
    """Return the pictures that a recipe names, if they are those that were trained on."""
    if section is None or not card.data or not Path(section.path).exists():
        return None
    # The hash is of the section as it was before training chose a resolution.
    for one in (section.model_copy(update={"resolution": "auto"}), section):
        try:
            found = read_own_pictures(base, one)
        except DataError:
            return None
        if found.reference().hash == card.data[0].hash:
            return tuple(row for row in found.train if not row.prior)
    return None


def _own(split: "PictureSplit") -> tuple[PictureRow, ...]:
    return tuple(row for row in (*split.train, *split.validation) if not row.prior)


def read_own_pictures(base: "Base", section: PictureSection) -> "PictureSplit":
    """Read pictures for a base, as a training of it does.

    Raises:
        DataError: They cannot be read.
    """
    from haori.bases.diffusion import PipelineProcessor

    processor = PipelineProcessor(base)
    return read_pictures(
        section, native_size=processor.native_size, size_multiple=processor.size_multiple, cut=processor.cut
    )
