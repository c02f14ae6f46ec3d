"""Weights of a blend, found on validation data: the adapters are attached once, and only their weights change.

The blend with all weights 1 is one LoRA whose B holds the adapters' B side by side; multiplying the columns of each by
its weight gives every other blend exactly. From the best of a few usual blends the search goes along one weight at a
time, in ever smaller steps, to the least mean loss over the skills; each file of rows counts as one skill, however many
rows it has.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from haori.bases import load_model, load_tokenizer
from haori.core.errors import InputError, MismatchError
from haori.core.records import MODEL_COMPONENT
from haori.library import Library, attach_files, inspect_adapter, joint_format, prompt_format
from haori.library.combining.blending import Part
from haori.library.combining.factors import factors_of, stacked
from haori.library.combining.stored import known_base, read_parts
from haori.library.combining.storing import check_same_base
from haori.library.formats.registry import format_named
from haori.library.updates import AdapterUpdates
from haori.metrics.kinds import KINDS
from haori.tasks.examination import MeasureOptions
from haori.tasks.recipe import recipe_from
from haori.tasks.registry import task_of

if TYPE_CHECKING:
    from rich.table import Table

    from haori.bases import Base
    from haori.library import StoredAdapter
    from haori.tasks.examination import Examination, Scores

__all__ = ["FoundWeights", "Skill", "descend", "search_weights", "skills_table"]

Weights = tuple[float, ...]
_STEPS = (0.2, 0.1, 0.05)
_MOST_WEIGHT = 1.5
_PER_ADAPTER = 20
_LEAST_GAIN = 1e-6
_PARAMETERS = ("lora_B", "lora_embedding_B")


class Skill(NamedTuple):
    """What the rows of one file say, by their metric.

    Attributes:
        name: The file.
        metric: Which metric the figures are of.
        base: The bare base's figure.
        alone: That of each adapter at weight 1.
        blend: That of the blend.
    """

    name: str
    metric: str
    base: float
    alone: tuple[float, ...]
    blend: float


class FoundWeights(NamedTuple):
    """Adapters with the weights that were found, what these are worth, and how many blends were measured."""

    parts: tuple[tuple[str, float], ...]
    skills: tuple[Skill, ...]
    measured: int


def search_weights(
    names: Sequence[str], data: Sequence[str], *, base_spec: str | None = None, library: Library | None = None
) -> FoundWeights:
    """Find the weights at which a blend of text adapters fits validation data best.

    Args:
        names: Two adapters or more.
        data: Files, folders or hub ids of rows; rows are grouped by the file that they are in.
        base_spec: Base to use instead of the one on the cards.
        library: The library; by default that of this machine.

    Raises:
        InputError: There is one adapter only, or they write no text.
        MismatchError: They have different bases, or what one changes is no sum of thin matrices (DoRA).
        DataError: The rows cannot be read or measured.
    """
    library = library or Library()
    if len(names) < 2:
        raise InputError("Weights are searched for a blend of two adapters or more; name another one.")
    parents = [library.get(name) for name in names]
    check_same_base(parents)
    base = known_base(parents, base_spec)
    if base is None or base.pipeline is not None or any(parent.card.head is not None for parent in parents):
        raise InputError("Weights are searched for adapters of text models without heads; give the weights yourself.")
    groups = _groups(parents, data)
    parts = read_parts(base, [(parent, 1.0) for parent in parents])
    with _Blender.opened(base, parts) as blender:
        tokenizer = load_tokenizer(base)
        spoken = joint_format([prompt_format(tokenizer, parent.path, parent.card) for parent in parents])
        task = task_of(parents[0].card.task)
        options = MeasureOptions(labels="none", control_tokens=spoken.control_tokens)
        options = options if task.kind == "preference" else _likelihood(options)
        exams = {name: task.examine(blender.model, spoken.tokenizer, rows, options) for name, rows in groups.items()}
        scores: dict[Weights, dict[str, Scores]] = {}
        most = _PER_ADAPTER * len(parts)

        def loss(weights: Weights) -> float:
            scores[weights] = blender.scored(weights, exams, f"blend {len(scores) + 1} of at most {most}")
            return sum(map(_loss, scores[weights].values())) / len(exams)

        best = descend(loss, len(parts), most)
        nothing = blender.scored((0.0,) * len(parts), exams, "base")
    count = len(scores)
    return FoundWeights(
        tuple((parent.name, weight) for parent, weight in zip(parents, best, strict=True)),
        tuple(_skill(name, nothing, scores, best) for name in exams),
        count,
    )


def descend(loss: Callable[[Weights], float], count: int, most: int) -> Weights:
    """Return the weights of least loss that are found by changing one at a time.

    Measured first are each adapter alone, their mean and their sum; a weight is between 0 and 1.5.

    Args:
        loss: What is to be small.
        count: How many weights there are.
        most: Most losses to look at; the first ones are looked at in any case.
    """
    seen: dict[Weights, float] = {}

    def look(weights: Weights) -> float:
        if weights not in seen:
            seen[weights] = loss(weights)
        return seen[weights]

    alone = [tuple(float(place == at) for place in range(count)) for at in range(count)]
    starts = [*alone, (round(1 / count, 2),) * count, (1.0,) * count]
    best = min(starts, key=look)
    for step in _STEPS:
        moved = True
        while moved:
            moved = False
            for place in range(count):
                for change in (step, -step):
                    weight = round(min(_MOST_WEIGHT, max(0.0, best[place] + change)), 2)
                    other = (*best[:place], weight, *best[place + 1 :])
                    if (len(seen) < most or other in seen) and look(other) < look(best) - _LEAST_GAIN:
                        best, moved = other, True
    return best


def skills_table(found: FoundWeights) -> "Table":
    """Return one line per skill: the base, each adapter alone, and the blend."""
    from rich.table import Table
    from rich.text import Text

    names = [name for name, _ in found.parts]
    blend = " + ".join(f"{weight:g} {name}" for name, weight in found.parts)  # names hold no markup
    table = Table("skill", "metric", "base", *names, blend)
    for skill in found.skills:
        kind = KINDS[skill.metric]
        figures = [f"{value:.4g}" for value in (skill.base, *skill.alone, skill.blend)]
        table.add_row(Text(skill.name), f"{kind.title} ({kind.better} is better)", *figures)
    return table


class _Blender:
    """A base with the adapters on it side by side, as one LoRA."""

    def __init__(self, model: Any, spans: dict[str, list[tuple[int, int, int]]]) -> None:
        self.model = model
        self._whole = {}
        for name, parameter in model.named_parameters():
            module = next((name.split(f".{part}")[0] for part in _PARAMETERS if f".{part}" in name), None)
            if module is not None:
                key = module.removeprefix("base_model.model.")
                self._whole[name] = (parameter, parameter.detach().clone(), spans[key])

    @classmethod
    @contextmanager
    def opened(cls, base: "Base", parts: Sequence[Part]) -> "Iterator[_Blender]":
        """Write the blend with all weights 1, and put it on the base."""
        modules, spans = {}, {}
        for name in dict.fromkeys(name for part in parts for name in part.updates.modules):
            own = [(at, part.updates.modules[name]) for at, part in enumerate(parts) if name in part.updates.modules]
            for at, update in own:
                if update.magnitude is not None or update.bias is not None or parts[at].updates.extra:
                    raise MismatchError(
                        f"{parts[at].name!r} changes {name!r} by more than a product of thin matrices (DoRA, a bias or "
                        "whole parts); give the weights yourself."
                    )
            factors = [(at, factors_of(update)) for at, update in own]
            start, found = 0, []
            for at, factor in factors:
                found.append((at, start, start + factor.rank))
                start += factor.rank
            spans[name.partition(".")[2]] = found
            modules[name] = stacked([(factor, 1.0) for _, factor in factors]).update()
        with tempfile.TemporaryDirectory(prefix="haori-") as place:
            folder = Path(place) / "adapter"
            config = json.loads((base.components[MODEL_COMPONENT].path / "config.json").read_text(encoding="utf-8"))
            format_named("peft").write(AdapterUpdates(modules), folder, base_config=config)
            model = attach_files(load_model(base), inspect_adapter(folder), base_name=base.name)
        yield cls(model.eval(), spans)

    def scored(self, weights: Weights, exams: "dict[str, Examination]", label: str) -> "dict[str, Scores]":
        """Measure one blend on every skill."""
        with torch.no_grad():
            for parameter, whole, spans in self._whole.values():
                for at, start, end in spans:
                    parameter[:, start:end] = whole[:, start:end] * weights[at]
            return {name: exam.score(self.model, label) for name, exam in exams.items()}


def _groups(parents: "Sequence[StoredAdapter]", data: Sequence[str]) -> dict[str, list[Any]]:
    """Read rows and group them by their file."""
    kind = parents[0].card.task
    if other := next((parent for parent in parents if parent.card.task != kind), None):
        raise InputError(
            f"{parents[0].name!r} was trained for {kind} and {other.name!r} for {other.card.task}: there are no rows "
            "to measure both on; give the weights yourself."
        )
    task = task_of(kind)
    groups: dict[str, list[Any]] = {}
    for path in data:
        section = recipe_from({"name": "blend", "base": "any", "task": kind, "data": {"path": path}}, []).data
        rows, _, _ = task.read(section)
        if len({parent.card.system for parent in parents}) == 1:
            rows, _ = task.as_trained(rows, parents[0].card)
        for row in rows:
            groups.setdefault(str(row.origin).rpartition(":")[0] or path, []).append(row)
    return groups


def _likelihood(options: MeasureOptions) -> MeasureOptions:
    return MeasureOptions(labels="none", metrics=("perplexity",), control_tokens=options.control_tokens)


def _metric(scores: "Scores") -> str:
    return "perplexity" if "perplexity" in scores.metrics else next(iter(scores.metrics))


def _loss(scores: "Scores") -> float:
    """Return what is to be small: nats per token for a perplexity."""
    name = _metric(scores)
    value = scores.metrics[name].value
    if name == "perplexity":
        return math.log(value)
    return value if KINDS[name].better == "lower" else -value


def _skill(name: str, nothing: "dict[str, Scores]", scores: "dict[Weights, dict[str, Scores]]", best: Weights) -> Skill:
    metric = _metric(nothing[name])
    count = len(best)
    alone = [tuple(float(place == at) for place in range(count)) for at in range(count)]
    return Skill(
        name=name,
        metric=metric,
        base=nothing[name].metrics[metric].value,
        alone=tuple(scores[weights][name].metrics[metric].value for weights in alone),
        blend=scores[best][name].metrics[metric].value,
    )
