"""From a run's figures to next steps: what to change, to which value, and why.

`diagnosis` says what happened; this says what to do about it. One thing at a time: a learning rate that does not
suit the run is put right before anything else is judged. The thresholds are rules of thumb, stated where they are used
and explained in docs/guide/over-fitting.md.
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from haori.core.methods import LowRankMethod
from haori.core.records import Advice
from haori.tasks.recipe import Recipe
from haori.tasks.registry import DEFAULT_TASK
from haori.training.diagnosis import Reading, Validation, read_curves, validations_of
from haori.training.measurements import Measurements
from haori.training.spectrum import Spectrum, spectrum_of

__all__ = ["Outcome", "advise", "outcome_of"]

_HARDLY_USED = 0.98  # the larger half of the singular values holds this much energy: the other half does little
_ALL_USED = 0.75  # and this little when they are nearly flat (0.5 is flat)
_WIDE_GAP = 1.5  # loss on unseen rows over loss on training rows from which more rows are the best remedy
_DROPOUT = 0.05
_WRONG_PART = "a loss that does not move often means that the wrong part of each row is trained on"
_WRONG_THINGS = "a loss that does not move often means that the {} or their captions are not what they should be"


class Outcome(NamedTuple):
    """What the advice is made from: the resolved recipe and the figures of its run."""

    recipe: Recipe
    rows: int
    """Training rows."""
    steps: int
    """Optimizer steps done."""
    initial_loss: float
    """Validation loss before the first step."""
    validations: Sequence[Validation]
    step_losses: Sequence[float]
    clipped_share: float
    spectrum: Spectrum | None
    things: str = "rows"
    """What people call the rows."""
    initial: Validation | None = None
    """The validation before the first step, where its single pictures are known."""


def outcome_of(recipe: Recipe, rows: int, measurements: Measurements, adapter: Path, things: str = "rows") -> Outcome:
    """Gather the outcome of a run that is over.

    Args:
        recipe: Resolved.
        rows: Training rows.
        measurements: Of the run.
        adapter: Folder of the saved adapter; it may not exist.
        things: What people call the rows, in the plural.
    """
    steps, validations = measurements.series("train"), measurements.series("validation")
    limit = recipe.optimizer.max_grad_norm
    return Outcome(
        recipe,
        rows,
        steps=len(steps),
        initial_loss=validations[0]["loss"] if validations else math.nan,
        validations=validations_of(validations[1:]),
        step_losses=measurements.training_losses(),
        clipped_share=sum(line["grad_norm"] > limit for line in steps) / max(1, len(steps)),
        spectrum=spectrum_of(adapter),
        things=things,
        initial=validations_of(validations)[0] if validations else None,
    )


def advise(outcome: Outcome) -> tuple[Advice, ...]:
    """Return the next steps after a finished run, the most promising first."""
    if not outcome.validations:
        return (_hold_rows_out(outcome),)
    start = outcome.initial or outcome.initial_loss
    reading = read_curves(start, outcome.validations, outcome.step_losses, outcome.clipped_share)
    if reading.rate != "fine" or reading.fit == "unstable":
        return (_lower_rate(outcome, reading),)
    if reading.fit == "over-fitting":
        return (*_stop_earlier(outcome, reading), *_more_dropout(outcome, reading), _more_rows(outcome, reading.last),
                *_rank(outcome, reading))  # fmt: skip
    if reading.fit == "under-fitting":
        return (_train_longer(outcome, reading), *_raise_rate(outcome, 2.0, _still_falling(outcome)),
                *_rank(outcome, reading))  # fmt: skip
    if reading.fit == "not carried over":
        apart = f"{_gap(outcome, reading.last)}: what was held out may ask for something else than what was trained on"
        return (_look_at_data(outcome, apart), _more_rows(outcome, reading.last))
    if reading.fit == "nothing learnt":
        wrong = _WRONG_PART if outcome.things == "rows" else _WRONG_THINGS.format(outcome.things)
        return (*_raise_rate(outcome, 3.0, _hardly_moved(outcome, reading)), _look_at_data(outcome, wrong))
    wide = reading.best.loss > _WIDE_GAP * reading.best.train_loss
    return (*_stop_earlier(outcome, reading), *_rank(outcome, reading),
            *((_more_rows(outcome, reading.best),) if wide else ()), _search_rate(outcome))  # fmt: skip


def _change(action: str, reason: str, **changes: int | float) -> Advice:
    """Return advice to train again with other values; keys are written with `__` for the dot."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    flags = " ".join(f"--set {key}={value}" for key, value in named.items())
    return Advice(action=action, reason=reason, changes=dict(named), command=f"haori train RUN/recipe.yaml {flags}")


def _hold_rows_out(outcome: Outcome) -> Advice:
    reason = (
        f"without validation nobody can tell whether the {outcome.rows:,} {outcome.things} were understood or memorised"
    )
    return _change(f"Hold a tenth of the {outcome.things} out for validation", reason, data__validation_share=0.1)


def _lower_rate(outcome: Outcome, reading: Reading) -> Advice:
    lr = _rate_of(outcome.recipe)
    if reading.rate == "too high":
        reason = (
            f"training loss went from {reading.early_loss:.3f} to {reading.late_loss:.3f} and the best validation loss "
            f"is {reading.best.loss:.3f}, {outcome.initial_loss:.3f} before training"
        )
        return _change(f"Lower the learning rate from {lr:g} to a third", reason, optimizer__lr=_round(lr / 3))
    if reading.rate == "perhaps too high":
        reason = (
            f"{outcome.clipped_share:.0%} of the steps had their gradient clipped and training loss hardly fell "
            f"({reading.early_loss:.3f} to {reading.late_loss:.3f})"
        )
    else:
        reason = (
            f"after epoch {reading.best.epoch:.3g} validation loss rose from {reading.best.loss:.3f} to "
            f"{reading.last.loss:.3f}, and training loss with it"
        )
    return _change(f"Halve the learning rate, now {lr:g}", reason, optimizer__lr=_round(lr / 2))


def _raise_rate(outcome: Outcome, factor: float, reason: str) -> tuple[Advice, ...]:
    lr = _rate_of(outcome.recipe)
    if factor * lr >= 1.0 or outcome.clipped_share > 0.5:  # most steps were cut already: larger ones would be too
        return ()
    action = f"Raise the learning rate from {lr:g} to {factor:g} times that"
    return (_change(action, reason, optimizer__lr=_round(factor * lr)),)


def _still_falling(outcome: Outcome) -> str:
    return (
        f"larger steps are the other way to get further: only {outcome.clipped_share:.0%} of them had their gradient "
        "clipped, and training loss never rose"
    )


def _hardly_moved(outcome: Outcome, reading: Reading) -> str:
    return (
        f"validation loss only went from {outcome.initial_loss:.3f} to {reading.best.loss:.3f}, and "
        f"{outcome.clipped_share:.0%} of the steps had their gradient clipped"
    )


def _stop_earlier(outcome: Outcome, reading: Reading) -> tuple[Advice, ...]:
    """Advise as many epochs as the best validation needed, if that is fewer than the run was given."""
    best, last = reading.best, reading.last
    wanted, given = math.ceil(best.epoch - 1e-9), outcome.recipe.training.epochs
    assert given != "auto"
    if wanted >= given or wanted >= last.epoch - 1e-9:
        return ()
    ends = "" if outcome.recipe.schedule.kind == "constant" else "; the learning rate then falls to zero there"
    reason = (
        f"validation loss was lowest at epoch {best.epoch:.3g} ({best.loss:.3f}) and {last.loss:.3f} at epoch "
        f"{last.epoch:.3g}{ends}"
    )
    return (_change(f"Train for {wanted} epoch{'s' * (wanted > 1)}", reason, training__epochs=wanted),)


def _train_longer(outcome: Outcome, reading: Reading) -> Advice:
    training = outcome.recipe.training
    assert training.epochs != "auto"
    reason = f"validation loss was still falling at the end, to {reading.last.loss:.3f} in the last stretch"
    if training.max_steps is not None and outcome.steps >= training.max_steps:
        epochs = max(training.epochs, math.ceil(2 * reading.last.epoch))
        action = f"Train for {2 * outcome.steps:,} steps"
        return _change(action, reason, training__max_steps=2 * outcome.steps, training__epochs=epochs)
    return _change(f"Train for {2 * training.epochs} epochs", reason, training__epochs=2 * training.epochs)


def _more_dropout(outcome: Outcome, reading: Reading) -> tuple[Advice, ...]:
    given = getattr(outcome.recipe.method, "dropout", None)
    dropout = 0.0 if given == "auto" else given
    if dropout is None or dropout >= 2 * _DROPOUT:
        return ()
    reason = f"{_gap(outcome, reading.last)}; dropout makes {outcome.things} harder to memorise, at some cost in time"
    wanted = _DROPOUT if dropout < _DROPOUT else 2 * _DROPOUT
    return (_change(f"Use dropout {wanted:g}", reason, method__dropout=wanted),)


def _more_rows(outcome: Outcome, at: Validation) -> Advice:
    reason = (
        f"{_gap(outcome, at)}; with {outcome.rows:,} {outcome.things} to learn from this helps more than any setting"
    )
    return Advice(action=f"Add {outcome.things}, say {outcome.rows:,} more", reason=reason)


def _gap(outcome: Outcome, at: Validation) -> str:
    things = outcome.things
    return (
        f"at epoch {at.epoch:.3g} loss was {at.train_loss:.3f} on training {things} and {at.loss:.3f} on {things} held "
        f"out, a gap of {at.loss - at.train_loss:.3f}"
    )


def _look_at_data(outcome: Outcome, reason: str) -> Advice:
    recipe = outcome.recipe
    task = [] if recipe.task == DEFAULT_TASK else ["--task", recipe.task]
    words = ["haori", "data", "check", recipe.data.path, "--base", recipe.base, *task, "--show", "3"]
    return Advice(action="Look at what is trained on", reason=reason, command=shlex.join(words))


def _rank(outcome: Outcome, reading: Reading) -> tuple[Advice, ...]:
    """Advise half or twice the rank where the spectrum of the update says so.

    The rank is not judged where the adapter on disk has another one than the recipe (PiSSA and OLoRA store twice the
    rank), and it is not raised where the run memorised rows: capacity is not what it lacks.
    """
    method, spectrum = outcome.recipe.method, outcome.spectrum
    if spectrum is None or not isinstance(method, LowRankMethod) or method.rank != spectrum.rank:
        return ()
    if method.alpha == "auto" or method.rank_pattern:
        return ()
    share = (
        f"over {spectrum.modules} modules, the largest {spectrum.rank // 2} of {spectrum.rank} singular values of the "
        f"update hold {spectrum.top_half:.1%} of its energy"
    )
    if spectrum.top_half >= _HARDLY_USED:
        rank, reason = spectrum.rank // 2, f"{share}; half the rank makes the file half as large"
        action = f"Lower the rank to {rank}"
    elif spectrum.top_half <= _ALL_USED and reading.fit != "over-fitting":
        rank, reason = 2 * spectrum.rank, f"{share}: it uses all the rank it has (50% would be flat)"
        action = f"Raise the rank to {rank}"
    else:
        return ()
    ratio = rank / spectrum.rank
    alpha = method.alpha * (math.sqrt(ratio) if method.rslora else ratio)  # the scale stays as it is
    return (_change(action, reason, method__rank=rank, method__alpha=float(f"{alpha:.4g}")),)


def _search_rate(outcome: Outcome) -> Advice:
    lr = _rate_of(outcome.recipe)
    low, high = _round(lr / 4), min(_round(lr * 4), 0.9)
    return Advice(
        action="Search for a better learning rate",
        reason=f"the run went well at {lr:g}, and this is the setting that matters most",
        command=f"haori sweep RUN/recipe.yaml --over optimizer.lr=log:{low:g}:{high:g} --trials 8",
    )


def _rate_of(recipe: Recipe) -> float:
    assert recipe.optimizer.lr != "auto"
    return recipe.optimizer.lr


def _round(rate: float) -> float:
    """Return a rate with two digits, as people write it."""
    return float(f"{rate:.2g}")
