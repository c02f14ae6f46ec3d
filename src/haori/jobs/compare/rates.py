"""The learning rate of a method: a few rates around the recipe's, judged by validation loss with one seed.

Three rates a factor of 3 apart, the recipe's or automatic one in the middle; if the best is at an end, one more beyond
it. Methods need different rates, so a comparison at one rate for all would compare rates, not methods.
"""

import math
from typing import NamedTuple

from haori.jobs.compare.folder import ComparisonFolder, RunOutcome
from haori.jobs.compare.recipes import run_key, with_run
from haori.jobs.compare.records import Rate
from haori.tasks.recipe import Recipe

__all__ = ["RateChoice", "choose_rate"]

_FACTOR = 3.0
_HIGHEST = 0.9  # a recipe's rate is below 1


class RateChoice(NamedTuple):
    """The rates tried, in order, and the best; `error` if none could be trained with."""

    rates: tuple[Rate, ...]
    lr: float | None
    error: str | None


def choose_rate(place: ComparisonFolder, recipe: Recipe, seed: int) -> RateChoice:
    """Train with each rate in a process of its own; only the best run is kept.

    Args:
        place: The comparison.
        recipe: Of one method.
        seed: The seed of all of these runs.
    """
    first = _try(place, recipe, seed, None)
    if first.trained is None:
        return RateChoice((), None, first.error)
    centre = first.trained.lr
    tried = {centre: first}
    for lr in (centre / _FACTOR, centre * _FACTOR):
        tried[lr] = _try(place, recipe, seed, lr)
    best = min(tried, key=lambda lr: _loss(tried[lr]))
    if best != centre:
        beyond = best * (best / centre)
        tried[beyond] = _try(place, recipe, seed, beyond)
        best = min(tried, key=lambda lr: _loss(tried[lr]))
    for lr, outcome in tried.items():
        if lr != best and outcome.trained is not None:
            place.forget_weights(outcome.trained)
    rates = tuple(Rate(lr=lr, validation_loss=_shown(tried[lr]), error=tried[lr].error) for lr in sorted(tried))
    return RateChoice(rates, None if best == centre else best, None)


def _try(place: ComparisonFolder, recipe: Recipe, seed: int, lr: float | None) -> RunOutcome:
    method = recipe.method.kind
    place.say(f"{method}, learning rate {'as in the recipe' if lr is None else f'{lr:.3g}'}")
    return place.run(with_run(recipe, seed, lr), run_key(method, lr, seed), measure=False)


def _loss(outcome: RunOutcome) -> float:
    loss = _shown(outcome)
    return math.inf if loss is None or math.isnan(loss) else loss


def _shown(outcome: RunOutcome) -> float | None:
    return None if outcome.trained is None else outcome.trained.run.validation_loss
