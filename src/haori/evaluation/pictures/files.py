"""The pictures of an evaluation on disk: each as PNG, one sheet of both systems, and those taken for copies."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from haori.core.storage import make_folder, staged_file
from haori.evaluation.pictures.looking import cropped
from haori.evaluation.pictures.result import DrawnPair, LikelyCopy, MeasuredPictures
from haori.tasks.examination import spread
from haori.tasks.text_to_image.sheet import SheetRow, draw_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

    from haori.data.pictures import PictureRow
    from haori.evaluation.pictures.asking import Asked
    from haori.images.generation import DrawnPicture
    from haori.metrics.memorisation import Closeness

__all__ = ["Shown", "save_png", "write_pictures"]

_PLACE = "pictures"
_SHEET = "evaluation.png"
_MOST_COPIES = 24
_MOST_COLUMNS = 12


class Shown(NamedTuple):
    """Everything that was drawn: by set of prompts (related, unrelated), and how near each is to the training ones."""

    asked: "tuple[Asked, Asked]"
    base: "list[list[DrawnPicture]]"
    adapter: "list[list[DrawnPicture]]"
    base_close: "Closeness | None"
    adapter_close: "Closeness | None"
    training: "Sequence[PictureRow]"


def write_pictures(
    folder: Path, shown: Shown, network: str, settings: dict[str, str], samples: int
) -> MeasuredPictures:
    """Write the pictures into `folder`, and return what the report says of them.

    Args:
        folder: Of the report.
        shown: What was drawn.
        network: What looked at it.
        settings: How it was drawn.
        samples: Prompts to show, spread over each set.

    Raises:
        StorageError: The folder cannot be written.
    """
    make_folder(folder / _PLACE)
    pairs: list[DrawnPair] = []
    chosen: list[int] = []
    for number, asked in enumerate(shown.asked):
        prompts = spread(samples, range(len(asked.prompts)))
        chosen += [len(pairs) + at for at, prompt in enumerate(asked.groups) if prompt in prompts]
        pairs += _pairs(folder, shown, number)
    _write_sheet(folder / _SHEET, shown, pairs, chosen)
    close = shown.adapter_close
    return MeasuredPictures(
        network, settings, tuple(pairs), tuple(chosen), None if close is None else close.limit,
        _copies(folder, shown, pairs), _SHEET,
    )  # fmt: skip


def save_png(picture: "DrawnPicture", path: Path) -> None:
    """Write a drawn picture with the text that says how it was made."""
    with staged_file(path) as stage:
        stage.write_bytes(picture.png())


def _pairs(folder: Path, shown: Shown, number: int) -> list[DrawnPair]:
    asked, unrelated = shown.asked[number], number == 1
    found = []
    for at, (text, base, adapter) in enumerate(
        zip(asked.texts, shown.base[number], shown.adapter[number], strict=True)
    ):
        names = {}
        for system, picture in (("base", base), ("adapter", adapter)):
            names[system] = f"{_PLACE}/{picture.seed:05d}-{system}.png"
            save_png(picture, folder / names[system])
        distances = [
            None if unrelated or close is None else float(close.distances[at])
            for close in (shown.base_close, shown.adapter_close)
        ]
        found.append(DrawnPair(text, adapter.seed, unrelated, names["base"], names["adapter"], *distances))
    return found


def _copies(folder: Path, shown: Shown, pairs: Sequence[DrawnPair]) -> tuple[LikelyCopy, ...]:
    close, of_base = shown.adapter_close, shown.base_close
    if close is None or of_base is None:
        return ()
    flagged = [int(at) for at in close.distances.argsort(kind="stable") if close.flagged[at]]
    found = []
    for at in flagged[:_MOST_COPIES]:
        place = int(close.nearest[at])
        row, name = shown.training[place], f"{_PLACE}/training-{place:05d}.png"
        with staged_file(folder / name) as stage:
            cropped(row).save(stage, format="PNG")
        distance, base = float(close.distances[at]), float(of_base.distances[at])
        found.append(LikelyCopy(pairs[at].prompt, pairs[at].seed, pairs[at].adapter, name, row.origin, distance, base))
    return tuple(found)


def _write_sheet(path: Path, shown: Shown, pairs: Sequence[DrawnPair], chosen: Sequence[int]) -> None:
    base: list[Image] = [one.image for some in shown.base for one in some]
    adapter: list[Image] = [one.image for some in shown.adapter for one in some]
    places = spread(_MOST_COLUMNS, chosen)
    titles = [f"{pairs[at].prompt} ({pairs[at].seed})" for at in places]
    rows = [SheetRow(label, [images[at] for at in places]) for label, images in (("base", base), ("adapter", adapter))]
    with staged_file(path) as stage:
        draw_sheet(rows, titles).save(stage, format="PNG")
