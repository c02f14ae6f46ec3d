"""Evaluates an adapter for pictures: draw, look, measure, write the report, note it on the card."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.hashing import short
from haori.core.settings import settings
from haori.core.storage import make_folder
from haori.data.pictures import PictureSection
from haori.evaluation.pictures.asking import Asked, PictureOptions, asked_of, caption_of
from haori.evaluation.pictures.data import PictureData, read_picture_data, require_pictures
from haori.evaluation.pictures.drawing import BASE, draw_systems, drawn_with, requests_of
from haori.evaluation.pictures.figures import Standard, UnrelatedStandard
from haori.evaluation.pictures.files import Shown, write_pictures
from haori.evaluation.pictures.looking import look, look_at_rows
from haori.evaluation.pictures.measuring import Found, add_fid, alike_note, measured, notes_of
from haori.evaluation.report import write_report
from haori.evaluation.result import EvaluationResult

if TYPE_CHECKING:
    from haori.images.generation import DrawnPicture
    from haori.metrics.picture_features import Seen
    from haori.metrics.picture_networks import PictureNetwork

__all__ = ["evaluate_pictures"]

_ADAPTER = "adapter"


def evaluate_pictures(
    name: str,
    section: PictureSection,
    *,
    options: PictureOptions,
    base_spec: str | None = None,
    samples: int = 8,
    out: Path | None = None,
) -> tuple[EvaluationResult, Path]:
    """Measure a stored adapter for pictures beside its base.

    Args:
        name: Adapter in the library.
        section: The pictures to hold drawn ones against.
        options: What is drawn, and how it is measured.
        base_spec: Base to use instead of the one on the card.
        samples: Prompts whose pictures the report shows.
        out: Folder of the report; by default `evaluations/<name>-<data hash>` under HAORI_HOME.

    Returns:
        The result, and the folder that holds evaluation.json, evaluation.html and the pictures.

    Raises:
        HaoriError: Adapter, base, pictures or prompts cannot be used.
    """
    from haori.images.generation import PictureGenerator
    from haori.library import Library
    from haori.library.opened import base_of
    from haori.metrics.picture_networks import load_network

    started = time.perf_counter()
    stored = Library().get(name)
    require_pictures(stored.card, name)
    base = base_of(stored.card, base_spec)
    data = read_picture_data(stored.card, base, section)
    asked, unrelated = asked_of(options, data.rows)
    tags = {BASE: "", _ADAPTER: f"<lora:{name}:{options.strength:g}>"}
    requests = requests_of((asked, unrelated), tags, options)
    network = load_network(options.features)
    generator = PictureGenerator(base, batch=options.batch)
    drawn = draw_systems(generator, requests)
    measure = _Measure(network, data, asked, unrelated, drawn)
    found, notes = measure.found(force_fid=options.force_fid)
    folder = out or settings().home / "evaluations" / f"{name.replace('@', '-')}-{short(data.reference.hash)}"
    make_folder(folder)
    shown = Shown(
        (asked, unrelated), drawn[BASE], drawn[_ADAPTER], measure.close[BASE], measure.close[_ADAPTER], data.training
    )
    how = {"Strength": f"{options.strength:g}", **drawn_with(drawn[BASE][0][0])}
    pictures = write_pictures(folder, shown, network.name, how, samples)
    told = dict.fromkeys(note for one in drawn[_ADAPTER][0] for note in one.notes)
    result = EvaluationResult(
        adapter=name, against=base.name, base=base.reference(), data=data.reference, metrics=found.metrics,
        base_intervals=found.of_base, labels=(), confusion=None, samples=(), rows=(),
        notes=(*data.notes, *told, *notes), seconds=time.perf_counter() - started, pictures=pictures,
    )  # fmt: skip
    write_report(result, folder)
    if stored.mounted is None:  # files of a mounted tree have no card to write on
        Library().update(name, evaluations=(result.to_record(),))
    return result, folder


class _Measure:
    """What the network sees in everything, and the figures of it."""

    def __init__(
        self,
        network: "PictureNetwork",
        data: PictureData,
        asked: Asked,
        unrelated: Asked,
        drawn: "dict[str, list[list[DrawnPicture]]]",
    ) -> None:
        self.network = network
        self.seen: dict[str, list[Seen]] = {
            name: [
                look(network, [one.image for one in some], what.texts, title=f"looking at pictures of the {name}")
                for some, what in zip(sets, (asked, unrelated), strict=True)
            ]
            for name, sets in drawn.items()
        }
        given = look_at_rows(network, data.rows, title="looking at the data").features
        training = given
        if data.training is not data.rows:
            training = look_at_rows(network, data.training, title="looking at the training pictures").features
        captions = [caption_of(row) for row in data.rows]
        self.standard = Standard(asked, given, captions, self.seen[BASE][0].features, training)
        self.unrelated = UnrelatedStandard(unrelated, self.seen[BASE][1].features)
        self.close = {name: self.standard.closeness(self.seen[name][0].features) for name in (BASE, _ADAPTER)}

    def found(self, *, force_fid: bool) -> tuple[Found, list[str]]:
        """Return the metrics, and how they are to be read."""
        found = Found({}, {})
        adapter, base = self.seen[_ADAPTER], self.seen[BASE]
        standard, unrelated = self.standard, self.unrelated
        measured(found, standard.figures(adapter[0]), standard.figures(base[0]), standard.asked.groups)
        measured(
            found,
            unrelated.figures(adapter[1].features),
            unrelated.figures(base[1].features, is_base=True),
            unrelated.asked.groups,
        )
        notes = notes_of(
            standard, unrelated, adapter[0].features, self.network.name, classes=adapter[0].classes is not None
        )
        close = self.close[_ADAPTER]
        if close is None:
            notes.append("Copies were not looked for: that takes three different training pictures or more.")
        else:
            notes.append(
                f"A picture is taken for a copy where its nearest training picture is at most {close.limit:.3f} away: "
                "one in twenty (5%) of the training pictures are so near to another, and about as many of new pictures "
                "like them would be. Look at the pairs."
            )
        notes += alike_note(found, min(len(standard.asked.prompts), len(unrelated.asked.prompts)))
        notes.append(add_fid(found, standard, adapter[0].features, force=force_fid))
        return found, notes
