"""Figures of drawn pictures as statistics over them, from what a network sees: against the data, and against the base.

The base is measured as an adapter is. Where its pictures are the references, a picture is never held against one of
the same seed (for the base that would be itself), nor, where style is asked for, against one of the same prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from haori.metrics.memorisation import Closeness, closeness
from haori.metrics.picture_sets import KernelDistance, PairMean, inception_score
from haori.metrics.pictures import centred_cosines, nearest_labels
from haori.metrics.statistics import mean_sums

if TYPE_CHECKING:
    from haori.evaluation.pictures.asking import Asked
    from haori.metrics.picture_features import Seen
    from haori.metrics.statistics import Array, Statistic

__all__ = ["Standard", "UnrelatedStandard"]

_FEWEST_FOR_KID = 2


@dataclass(frozen=True)
class Standard:
    """What pictures of the prompts are held against.

    Attributes:
        asked: The prompts.
        data: [m, d] features of the data.
        captions: [m] caption of each, as prompts are written.
        base: [n, d] features of what the base draws.
        training: [t, d] features of the pictures that were trained on; None where copies are not looked for.
    """

    asked: "Asked"
    data: "Array"
    captions: Sequence[str]
    base: "Array"
    training: "Array | None"

    def figures(self, seen: "Seen") -> "dict[str, Statistic]":
        """Measure pictures of the prompts, those of the base or of an adapter at some strength.

        Args:
            seen: What the network sees in them, in the order of the prompts and seeds.
        """
        features, asked = seen.features, self.asked
        groups = np.array(asked.groups)
        found: dict[str, Statistic] = {
            "data_similarity": mean_sums(centred_cosines(features, self.data, self.base.mean(0)).mean(1))
        }
        if len(asked.prompts) > 1:
            found["nearest_data"] = mean_sums(self._nearer_to_data(features, groups))
        if asked.captions and len(set(self.captions)) > 1:
            near = nearest_labels(features, self.data, self.captions)
            found["subject_retrieval"] = mean_sums([[text] == one for text, one in zip(asked.texts, near, strict=True)])
        if kept := _kept(features, self.base, groups):
            found["prompt_retrieval"] = kept
        if seen.likeness is not None:
            found["clip_score"] = mean_sums(100 * seen.likeness.clip(0))
        if asked.seeds > 1:
            apart = 1 - centred_cosines(features, features, self.base.mean(0))
            found["diversity"] = PairMean(apart, (groups[:, None] == groups) & ~np.eye(len(groups), dtype=bool))
        if (close := self.closeness(features)) is not None:
            found["memorised"] = mean_sums(close.flagged)
        if min(len(features), len(self.data)) >= _FEWEST_FOR_KID:
            found["kid"] = KernelDistance(features, self.data)
        if seen.classes is not None:
            found["classifier_score"] = inception_score(seen.classes)
        return found

    def closeness(self, features: "Array") -> Closeness | None:
        """Return how near pictures are to those that were trained on; None where that is not looked for."""
        return None if self.training is None else closeness(features, self.training)

    def among_data(self) -> float:
        """Return what the similarity to the data is for the data's own pictures: the mean over pairs of them."""
        cosines = centred_cosines(self.data, self.data, self.base.mean(0))
        return PairMean(cosines, ~np.eye(len(cosines), dtype=bool)).value

    def kept_by_data(self) -> float | None:
        """Return the share of prompts kept by the data's own pictures; None where the prompts are not their captions.

        No more can be asked of an adapter: a style by itself moves pictures away from what the base draws.
        """
        if not self.asked.captions or len(self.asked.prompts) < 2:
            return None
        captions = list(self.captions)
        real = self.data[[captions.index(prompt) for prompt in self.asked.prompts]]
        near = _own_cosines(real, self.base)
        return float(np.mean(np.array(self.asked.groups)[near.argmax(1)] == np.arange(len(real))))

    def _nearer_to_data(self, features: "Array", groups: "Array") -> "Array":
        """Return [n], whether the nearest of the data and of the base's pictures of other prompts is of the data."""
        both = np.concatenate([self.data, self.base])
        near = centred_cosines(features, both, both.mean(0))
        own = near[:, len(self.data) :]
        own[groups[:, None] == groups] = -np.inf
        return np.asarray(near[:, : len(self.data)].max(1) > own.max(1))


@dataclass(frozen=True)
class UnrelatedStandard:
    """What pictures of unrelated prompts are held against: those of the base.

    Attributes:
        asked: The prompts.
        base: [n, d] features of what the base draws.
    """

    asked: "Asked"
    base: "Array"

    def figures(self, features: "Array", *, is_base: bool = False) -> "dict[str, Statistic]":
        """Measure pictures of the prompts; how far they moved is not asked of the base."""
        found: dict[str, Statistic] = {}
        if not is_base:
            found["drift"] = mean_sums(self._moved(features))
        if kept := _kept(features, self.base, np.array(self.asked.groups)):
            found["unrelated_retrieval"] = kept
        return found

    def between_seeds(self) -> float:
        """Return the distance of the base's own pictures of one prompt from different seeds; NaN with one seed."""
        groups = np.array(self.asked.groups)
        apart = 1 - centred_cosines(self.base, self.base)
        return PairMean(apart, (groups[:, None] == groups) & ~np.eye(len(groups), dtype=bool)).value

    def _moved(self, features: "Array") -> "Array":
        return np.asarray(1 - np.diagonal(centred_cosines(features, self.base)))


def _own_cosines(features: "Array", base: "Array") -> "Array":
    """Return cosines of two sides, each seen from its own mean."""
    return centred_cosines(features - features.mean(0), base - base.mean(0), np.zeros(base.shape[1]))


def _kept(features: "Array", base: "Array", groups: "Array") -> "Statistic | None":
    """Return whether the nearest of the base's pictures from other seeds is one of the same prompt.

    Each side is seen from its own mean, so that a style, which moves all pictures alike, does not count.
    """
    numbers, counts = np.unique(groups, return_counts=True)
    if len(numbers) < 2 or counts.min() < 2:
        return None
    near = _own_cosines(features, base)
    np.fill_diagonal(near, -np.inf)  # picture i of both is of the same prompt and seed
    return mean_sums(groups[near.argmax(1)] == groups)
