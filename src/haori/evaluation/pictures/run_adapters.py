"""The adapters that a comparison of epochs draws with: the checkpoints of a run, or one of the library."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import InputError
from haori.core.records import DataReference
from haori.data.pictures import PictureRow, PictureSection
from haori.evaluation.pictures.data import read_own_pictures, read_picture_data, require_pictures
from haori.tasks.examination import spread
from haori.tasks.recipe import load_recipe

if TYPE_CHECKING:
    from haori.bases import Base

__all__ = ["EpochAdapter", "Source", "of_library", "of_run"]

_MOST_EPOCHS = 4
_SAME_EPOCH = 0.01


class EpochAdapter(NamedTuple):
    """An adapter after some epochs of training.

    Attributes:
        epoch: How many; None where that is not known.
        name: By which prompts name it.
        path: Its folder; None for one of the library.
        loss: On the pictures held out.
    """

    epoch: float | None
    name: str
    path: Path | None
    loss: float | None = None


class Source(NamedTuple):
    """What is compared.

    Attributes:
        name: Of the run or the adapter.
        base: What draws.
        adapters: In the order of their epochs.
        rows: Pictures to be like.
        training: Pictures that were trained on.
        reference: Identity of the pictures.
        notes: What a reader should know.
    """

    name: str
    base: "Base"
    adapters: tuple[EpochAdapter, ...]
    rows: tuple[PictureRow, ...]
    training: tuple[PictureRow, ...]
    reference: DataReference
    notes: tuple[str, ...]


def of_run(
    folder: Path, section: PictureSection | None, epochs: Sequence[float] | None, base_spec: str | None = None
) -> Source:
    """Return the checkpoints of a training run on pictures, and its pictures.

    Args:
        folder: Of the run.
        section: Pictures to be like; None takes those of the run.
        epochs: Which; None takes up to four of those that are kept, spread over the run.
        base_spec: Base to use instead of the recipe's.

    Raises:
        InputError: It is no run on pictures, its pictures are gone, or an epoch is not kept.
    """
    from haori.bases import find_base

    recipe = load_recipe(folder / "recipe.yaml")
    if not isinstance(recipe.data, PictureSection):
        raise InputError(f"{str(folder)!r} is a run of {recipe.task}; epochs and strengths are compared of pictures.")
    kept = _checkpoints(folder)
    if not kept:
        raise InputError(f"The run {str(folder)!r} has no checkpoints of an adapter; name the adapter instead.")
    chosen = _chosen(kept, epochs)
    base = find_base(recipe.base, revision=recipe.revision) if base_spec is None else find_base(base_spec)
    split = read_own_pictures(base, recipe.data)
    training = tuple(row for row in split.train if not row.prior)
    if section is not None:
        trigger = section.trigger or recipe.data.trigger
        given = read_own_pictures(base, section.model_copy(update={"validation_share": 0.0, "trigger": trigger}))
    rows = tuple(
        row for row in ((*split.train, *split.validation) if section is None else given.train) if not row.prior
    )
    notes = [
        f"Epochs kept of this run: {', '.join(f'{one.epoch:.3g}' for one in kept)}; "
        f"{'all of them' if len(chosen) == len(kept) else f'{len(chosen)} of them'} were compared. "
        "training.keep_checkpoints says how many are kept.",
    ]
    if section is None:
        notes.append(
            "The pictures to be like are those of the run; most were trained on, so see what is taken for copies."
        )
    reference = (split if section is None else given).reference()
    return Source(recipe.name, base, tuple(chosen), rows, training, reference, tuple(notes))


def of_library(
    name: str, section: PictureSection | None, epochs: Sequence[float] | None, base_spec: str | None = None
) -> Source:
    """Return one adapter of the library, and the pictures that its strengths are compared on.

    Args:
        name: In the library.
        section: The pictures; None takes those on its card.
        epochs: Refused: they are of a run.
        base_spec: Base to use instead of the one on the card.

    Raises:
        InputError: It is not for pictures, or there are no pictures to be like.
    """
    from haori.library import Library
    from haori.library.opened import base_of
    from haori.tasks.recipe import kept_recipe

    stored = Library().get(name)
    require_pictures(stored.card, name)
    if epochs is not None:
        raise InputError("Epochs are those of a run: give its folder instead of the adapter's name.")
    recipe = kept_recipe(stored.card)
    of_card = None if recipe is None or not isinstance(recipe.data, PictureSection) else recipe.data
    given = section or of_card
    if given is None:
        raise InputError(f"{name!r} does not say what it was trained on; give pictures with --data.")
    base = base_of(stored.card, base_spec)
    data = read_picture_data(stored.card, base, given)
    return Source(name, base, (EpochAdapter(None, name, None),), data.rows, data.training, data.reference, data.notes)


def _checkpoints(folder: Path) -> list[EpochAdapter]:
    from haori.training.checkpoint import checkpoints_of, step_of
    from haori.training.measurements import read_measurements

    measured = {
        line["step"]: line for line in read_measurements(folder / "metrics.jsonl") if line["kind"] == "validation"
    }
    found = []
    for path in checkpoints_of(folder):
        line = measured.get(step_of(path))
        if line is not None and (path / "adapter_model.safetensors").is_file():
            found.append(EpochAdapter(float(line["epoch"]), path.name, path, line["loss"]))
    return found


def _chosen(kept: Sequence[EpochAdapter], epochs: Sequence[float] | None) -> list[EpochAdapter]:
    if epochs is None:
        best = min(kept, key=lambda one: float("inf") if one.loss is None else one.loss)
        among = {one.name for one in spread(_MOST_EPOCHS - 1, [one for one in kept if one is not best])}
        return [one for one in kept if one is best or one.name in among]
    found = []
    for epoch in epochs:
        near = [one for one in kept if one.epoch is not None and abs(one.epoch - epoch) < _SAME_EPOCH]
        if not near:
            there = ", ".join(f"{one.epoch:.3g}" for one in kept)
            raise InputError(
                f"There is no checkpoint of epoch {epoch:g}; kept are {there}. A run keeps more with "
                "training.keep_checkpoints."
            )
        found.append(near[-1])
    return found
