"""Side-by-side answers: which rows to show, and what each system writes for them.

Rows where the two systems differ are preferred, spread evenly over the data; the note says so, since a reader
would otherwise take them for typical.
"""

from collections.abc import Sequence
from typing import Any

from haori.data.conversation import said
from haori.evaluation.examples import Example, spread
from haori.evaluation.groups import Part, Writer
from haori.evaluation.result import Answer, Sample, Turn
from haori.evaluation.systems import Both

__all__ = ["choose_rows", "make_samples"]


def choose_rows(count: int, total: int, answers: Both[Any] | None) -> tuple[list[int], str]:
    """Return the rows to show, in order, and the sentence that says how they were chosen.

    Args:
        count: Rows wanted.
        total: Rows there are.
        answers: Answers of both systems per row, to find where they differ; None if there are none yet.
    """
    differing: list[int] = []
    if answers is not None and answers.base is not None:
        pairs = zip(answers.adapter, answers.base, strict=True)
        differing = [index for index, (one, other) in enumerate(pairs) if one != other]
    chosen = spread(count, differing)
    alike = [index for index in range(total) if index not in set(differing)]
    rest = spread(count - len(chosen), alike)
    if chosen:
        note = (
            f"Samples were chosen among the {len(differing)} of {total} rows where adapter and base answer "
            "differently, spread evenly; they are not typical rows."
        )
        if rest:
            note += f" {len(rest)} of them are rows where both answer alike."
    else:
        note = f"Samples are spread evenly over the {total} rows."
    return sorted([*chosen, *rest]), note


def make_samples(
    writer: Writer, answered: Sequence[Example], count: int, *, written: Part | None, labelled: Part | None
) -> tuple[tuple[Sample, ...], list[str]]:
    """Return the samples and how they were chosen.

    Args:
        writer: Writes the answers that do not exist yet.
        answered: Rows that have a reference answer.
        count: Samples wanted.
        written: Rows with generated answers, if there are any: samples are then chosen among these.
        labelled: All of `answered` with their labels, in a label task.
    """
    rows = written.examples if written else [example for example in answered if writer.fits(example)]
    if count < 1 or not rows:
        return (), []
    labels = _labels_of(labelled, rows) if labelled else None
    texts: Both[list[str]] | None = written.group.answers if written else None
    chosen, note = choose_rows(count, len(rows), labels or texts)
    examples = [rows[index] for index in chosen]
    shown = writer.write(examples, "Samples") if texts is None else _at(texts, chosen)
    names = _at(labels, chosen) if labels else Both([None] * len(chosen), [None] * len(chosen))
    samples = []
    for place, example in enumerate(examples):
        turns = tuple(Turn(m["role"], said(m)) for m in example.conversation.messages[:-1])
        adapter = Answer(label=names.adapter[place], text=shown.adapter[place])
        base = None
        if shown.base is not None and names.base is not None:
            base = Answer(label=names.base[place], text=shown.base[place])
        samples.append(Sample(example.index, example.origin, turns, str(example.reference), adapter, base))
    note += f" Sample answers are greedy and at most {writer.max_new_tokens} tokens long."
    return tuple(samples), [note]


def _labels_of(labelled: Part, rows: Sequence[Example]) -> Both[Any]:
    place = {example.index: at for at, example in enumerate(labelled.examples)}
    return _at(labelled.group.answers, [place[row.index] for row in rows])


def _at(answers: Both[Any], places: Sequence[int]) -> Both[Any]:
    base = None if answers.base is None else [answers.base[place] for place in places]
    return Both([answers.adapter[place] for place in places], base)
