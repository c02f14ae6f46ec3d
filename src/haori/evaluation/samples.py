"""Side-by-side answers: which rows to show, and what each system answers there.

Rows where the two systems differ are preferred, spread evenly over the data; the note says so, since a reader
would otherwise take them for typical.
"""

from collections.abc import Sequence
from typing import Any

from haori.evaluation.systems import Pair, Systems
from haori.tasks.examination import Examination, Sample, Scores, spread

__all__ = ["choose_rows", "make_samples"]


def choose_rows(count: int, total: int, answers: Pair[Any] | None) -> tuple[list[int], str]:
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
    examination: Examination, systems: Systems, scores: Pair[Scores], count: int
) -> tuple[tuple[Sample, ...], list[str]]:
    """Return the samples and how they were chosen.

    Args:
        examination: The rows.
        systems: Which answer where they have not answered yet.
        scores: What they scored.
        count: Samples wanted.
    """
    rows = examination.sampled(scores.adapter)
    if count < 1 or not rows:
        return (), []
    chosen, note = choose_rows(count, len(rows), _given(scores, [row.index for row in rows]))
    shown = [rows[place] for place in chosen]
    kept = {"adapter": scores.adapter, "base": scores.base}

    def answer(model: Any, system: str) -> list[Any]:
        own = kept[system]
        assert own is not None
        return examination.answers(model, system, shown, own)

    answers = systems.on_both(answer)
    samples = tuple(
        Sample(
            row.index, row.origin, examination.prompt(row), str(row.reference), answers.adapter[place],
            None if answers.base is None else answers.base[place],
        )
        for place, row in enumerate(shown)
    )  # fmt: skip
    how = examination.sample_note()
    return samples, [f"{note} {how}".rstrip()]


def _given(scores: Pair[Scores], indices: Sequence[int]) -> Pair[Any] | None:
    """Return the labels, or else the texts, that both systems gave; None where neither was asked of them."""
    for name in ("label", "text"):
        sides = [
            None if side is None else [getattr(side.answers[index], name) for index in indices]
            for side in (scores.adapter, scores.base)
        ]
        if sides[0] is not None and all(value is not None for value in sides[0]):
            return Pair(sides[0], sides[1])
    return None
