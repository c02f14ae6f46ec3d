"""Compares epochs and strengths of one adapter for pictures: all draw the same prompts and seeds as the base."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.records import BaseReference, DataReference, now
from haori.core.settings import settings
from haori.core.storage import make_folder, make_stamped_folder
from haori.evaluation.bootstrap import Interval, intervals
from haori.evaluation.pictures.asking import Asked, PictureOptions, asked_of, caption_of
from haori.evaluation.pictures.choosing import RULE, Choice, Setting, choose
from haori.evaluation.pictures.drawing import BASE, draw_systems, drawn_with, requests_of
from haori.evaluation.pictures.figures import Standard, UnrelatedStandard
from haori.evaluation.pictures.looking import look, look_at_rows
from haori.evaluation.pictures.measuring import Found, kept_note, measured

if TYPE_CHECKING:
    from PIL.Image import Image

    from haori.evaluation.pictures.run_adapters import EpochAdapter, Source
    from haori.images.generation import DrawnPicture
    from haori.metrics.picture_features import Seen
    from haori.metrics.picture_networks import PictureNetwork
    from haori.metrics.statistics import Statistic

__all__ = ["ComparedSettings", "compare_settings"]


@dataclass(frozen=True)
class ComparedSettings:
    """Settings of one adapter beside each other.

    Attributes:
        name: Of the run or adapter.
        base: Its base.
        data: The pictures to be like.
        prompts: What was drawn.
        unrelated: Prompts that have nothing to do with the data.
        seeds: Pictures of each prompt.
        network: What looked at them.
        drawn_with: Steps, sampler and others, as infotext calls them.
        settings: By epoch, then strength.
        choice: What is recommended.
        rule: By which rule.
        notes: How to read it.
        seconds: Time taken.
        time: When it ended.
    """

    name: str
    base: BaseReference
    data: DataReference
    prompts: tuple[str, ...]
    unrelated: tuple[str, ...]
    seeds: int
    network: str
    drawn_with: dict[str, str]
    settings: tuple[Setting, ...]
    choice: Choice
    notes: tuple[str, ...]
    seconds: float
    rule: str = RULE
    time: str = field(default_factory=now)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-like data."""
        plain: dict[str, Any] = {name: value for name, value in vars(self).items() if name not in {"base", "data"}}
        plain |= {"base": self.base.model_dump(), "data": self.data.model_dump(), "choice": asdict(self.choice)}
        plain["settings"] = [
            {**vars(one), "metrics": {name: metric.model_dump() for name, metric in one.metrics.items()}}
            for one in self.settings
        ]
        return plain


def compare_settings(
    source: "Source",
    strengths: Sequence[float],
    *,
    options: PictureOptions,
    out: Path | None = None,
) -> tuple[ComparedSettings, Path]:
    """Draw, measure and recommend an epoch and a strength.

    Args:
        source: Adapters, base and pictures.
        strengths: Of each adapter.
        options: What is drawn, and how it is measured; its strength is not used.
        out: Folder of the report; by default one under `comparisons` in HAORI_HOME.

    Returns:
        The comparison, and the folder with comparison.json, comparison.html, comparison.png and the pictures.

    Raises:
        HaoriError: An adapter or a prompt cannot be used.
    """
    from haori.evaluation.pictures.compared_report import write_comparison
    from haori.images.generation import PictureGenerator
    from haori.metrics.picture_networks import load_network

    started = time.perf_counter()
    asked, unrelated = asked_of(options, source.rows)
    planned = [(adapter, strength) for adapter in source.adapters for strength in strengths]
    tags = {f"{at}": f"<lora:{adapter.name}:{strength:g}>" for at, (adapter, strength) in enumerate(planned)}
    requests = requests_of((asked, unrelated), {BASE: "", **tags}, options)
    network = load_network(options.features)
    generator = PictureGenerator(source.base, batch=options.batch)
    for adapter in source.adapters:
        if adapter.path is not None:
            generator.adapters.name(adapter.path, adapter.name)
    drawn = draw_systems(generator, requests)
    measure = _Measured(network, source, asked, unrelated, drawn)
    found = [measure.setting(adapter, strength, f"{at}") for at, (adapter, strength) in enumerate(planned)]
    compared = ComparedSettings(
        source.name, source.base.reference(), source.reference, asked.prompts, unrelated.prompts, asked.seeds,
        network.name, drawn_with(drawn[BASE][0][0]), tuple(found), choose(found, measure.less_like),
        (*source.notes, *measure.notes()),
        time.perf_counter() - started,
    )  # fmt: skip
    folder = out or make_stamped_folder(settings().home / "comparisons", source.name.replace("@", "-"))
    make_folder(folder)
    write_comparison(compared, folder, [drawn[name] for name in drawn])
    return compared, folder


class _Measured:
    """What the network sees in the pictures of every setting."""

    def __init__(
        self,
        network: "PictureNetwork",
        source: "Source",
        asked: Asked,
        unrelated: Asked,
        drawn: "dict[str, list[list[DrawnPicture]]]",
    ) -> None:
        every: list[Image] = [one.image for sets in drawn.values() for some in sets for one in some]
        texts = [text for _ in drawn for one in (asked, unrelated) for text in one.texts]
        seen = look(network, every, texts, title="looking at pictures")
        self._seen: dict[str, tuple[Seen, Seen]] = {}
        first, both = len(asked.groups), len(asked.groups) + len(unrelated.groups)
        for at, name in enumerate(drawn):
            start = at * both
            self._seen[name] = (_part(seen, start, start + first), _part(seen, start + first, start + both))
        data = look_at_rows(network, source.rows, title="looking at the data").features
        training = look_at_rows(network, source.training, title="looking at the training pictures").features
        captions = [caption_of(row) for row in source.rows]
        self.standard = Standard(asked, data, captions, self._seen[BASE][0].features, training)
        self.unrelated = UnrelatedStandard(unrelated, self._seen[BASE][1].features)
        self._similar: list[Statistic] = []
        self._kept = self.standard.kept_by_data()
        self._network = network.name

    def setting(self, adapter: "EpochAdapter", strength: float, name: str) -> Setting:
        """Measure one setting beside the base; they come in their order."""
        found = Found({}, {})
        own, base = self._seen[name], self._seen[BASE]
        figures = self.standard.figures(own[0])
        self._similar.append(figures["data_similarity"])
        measured(found, figures, self.standard.figures(base[0]), self.standard.asked.groups)
        measured(
            found,
            self.unrelated.figures(own[1].features),
            self.unrelated.figures(base[1].features, is_base=True),
            self.unrelated.asked.groups,
        )
        where = adapter.name if adapter.path is None else str(adapter.path)
        return Setting(adapter.epoch, strength, where, found.metrics, adapter.loss, self._kept)

    def less_like(self, one: int, other: int) -> Interval | None:
        """Return how much less the pictures of `other` are like the data than those of `one`, as an interval."""
        found = intervals(self._similar[one], self._similar[other], groups=self.standard.asked.groups)
        return None if found is None else found.difference

    def notes(self) -> list[str]:
        """Return how the figures are to be read."""
        asked = self.standard.asked
        notes = [
            f"Pictures are compared by features of {self._network}; figures of another network do not compare.",
            "Every setting drew the same prompts from the same seeds as the base. Intervals are 95% bootstrap: prompts "
            "are drawn again, and seeds within them.",
            "Similarity to the data is about 0 for the base, and "
            f"{self.standard.among_data():.3f} among the data themselves.",
            *kept_note(self.standard),
        ]
        if asked.seeds < 2:
            notes.append("Which prompts were kept needs two seeds or more; the rule did without.")
        if len(asked.prompts) < 10:
            notes.append(f"Only {len(asked.prompts)} prompts: intervals from so few are too narrow; use 30 or more.")
        return notes


def _part(seen: "Seen", start: int, end: int) -> "Seen":
    from haori.metrics.picture_features import Seen

    return Seen(*(None if column is None else column[start:end] for column in seen))  # type: ignore[arg-type]
