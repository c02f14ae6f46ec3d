"""The figures of the gate, from features of pictures: subject, style, and distance from real pictures."""

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from lists import STYLES, SUBJECTS

from haori.metrics.pictures import kernel_inception_distance, nearest_labels, retrieval

__all__ = ["BARS", "captions", "judge"]

BARS = {"first": 0.5, "in_five": 0.75, "style": 0.9}
"""What the base has to reach."""


def captions(count: int = 64) -> list[tuple[str, str]]:
    """(style, subject) of the captions asked for: `count` different subjects, the styles in turn."""
    subjects = random.Random(0).sample(SUBJECTS, count)
    styles = list(STYLES)
    return [(styles[place % len(styles)], subject) for place, subject in enumerate(subjects)]


def judge(
    generated: npt.ArrayLike, asked: Sequence[tuple[str, str]], real: npt.ArrayLike, labels: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """The figures of the gate.

    Args:
        generated: [n, d] features of the pictures generated.
        asked: [n] style and subject of each.
        real: [m, d] features of the trained pictures.
        labels: [m] style and subject of each.
    """
    found = retrieval(generated, [subject for _, subject in asked], real, [subject for _, subject in labels])
    styles = nearest_labels(generated, real, [style for style, _ in labels])
    right = sum(near[0] == style for near, (style, _) in zip(styles, asked, strict=True))
    wanted = set(asked)
    same = np.array([label in wanted for label in labels])
    real = np.asarray(real)
    return {
        "first": found.first,
        "in_five": found.in_five,
        "style": right / len(asked),
        "kid": kernel_inception_distance(generated, real),
        "kid_of_real": kernel_inception_distance(real[same], real[~same]),
    }
