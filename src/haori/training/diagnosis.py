"""Reads a run's figures and says in plain words what happened; `advice` says what to do about it.

Every sentence carries the numbers behind it. The thresholds are stated where they are used; they are rules of
thumb for losses that are likelihoods (nats per token, row or pair), not statistics. Where the losses of single pictures
are known, changes are compared with their paired noise instead (`paired`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from haori.training.paired import Change, change

__all__ = ["Reading", "Validation", "diagnose", "read_curves", "validations_of"]

_RISE = 1.02  # validation loss counts as risen 2% above its best
_STILL_FALLING = 0.98  # and as still falling when the last validation won 2% or more

_SHARE_STILL_FALLING = 0.05  # of a loss told from its noise: a twentieth of all it fell, in the last stretch
_LEARNT = 0.9  # training loss a tenth below the loss before training: something was learnt

Fit = Literal[
    "over-fitting", "unstable", "under-fitting", "not carried over", "nothing learnt", "levelled off", "one validation"
]
Rate = Literal["fine", "perhaps too high", "too high"]


class Validation(NamedTuple):
    """One validation: epochs done, validation loss, mean training loss since the last one.

    Attributes:
        epoch: Epochs done.
        loss: Mean over what was held out.
        train_loss: Mean since the last validation; of training pictures that are measured like those, at this one.
        losses: Of the single pictures held out, where they are known.
        train_losses: Of the single training pictures.
    """

    epoch: float
    loss: float
    train_loss: float
    losses: Sequence[float] = ()
    train_losses: Sequence[float] = ()


class Reading(NamedTuple):
    """What the curves of a run show: how well it fits, and whether its learning rate suits it."""

    fit: Fit
    rate: Rate
    best: Validation
    last: Validation
    early_loss: float
    """Mean training loss of the first quarter of the steps."""
    late_loss: float
    """Mean training loss of the last quarter."""


def validations_of(lines: Sequence[Mapping[str, Any]]) -> list[Validation]:
    """Return the validations of a run from the lines of its measurements, that before the first step included."""
    return [
        Validation(
            line["epoch"], line["loss"], line.get("train_loss", line["loss"]),
            line.get("losses", ()), line.get("train_losses", ()),
        )
        for line in lines
    ]  # fmt: skip


def read_curves(
    initial: "Validation | float",
    validations: Sequence[Validation],
    step_losses: Sequence[float],
    clipped_share: float,
) -> Reading:
    """Read the curves of a run with at least one validation.

    Args:
        initial: The validation before the first step, or its loss alone.
        validations: In order.
        step_losses: Training loss of each optimizer step.
        clipped_share: Share of steps whose gradient was cut to `max_grad_norm`.
    """
    start = _start(initial)
    best, last = min(validations, key=lambda v: v.loss), validations[-1]
    quarter = max(1, len(step_losses) // 4)
    early, late = sum(step_losses[:quarter]) / quarter, sum(step_losses[-quarter:]) / quarter
    rate: Rate = "fine"
    of_training = change(start.train_losses, last.train_losses)
    rose = late > 1.2 * early if of_training is None else of_training.is_rise
    if _has_risen(start, best) or rose:
        rate = "too high"
    elif clipped_share > 0.9 and late > 0.9 * early and len(step_losses) >= 20:
        rate = "perhaps too high"
    return Reading(_fit(start, validations, best, last), rate, best, last, early, late)


def diagnose(
    initial: "Validation | float",
    validations: Sequence[Validation],
    step_losses: Sequence[float],
    clipped_share: float,
) -> tuple[str, ...]:
    """Describe a run; the arguments are those of `read_curves`, and there may be no validation."""
    if not validations:
        return ("There was no validation, so nothing can be said about over- or under-fitting.",)
    reading = read_curves(initial, validations, step_losses, clipped_share)
    best, last = reading.best, reading.last
    initial_loss = _start(initial).loss
    said = [f"Validation loss went from {initial_loss:.3f} to {best.loss:.3f} at epoch {best.epoch:.3g}."]
    if reading.rate == "too high":
        said.append(
            f"The learning rate is too high: training loss went from {reading.early_loss:.3f} (first quarter) to "
            f"{reading.late_loss:.3f} (last), best validation {best.loss:.3f} against {initial_loss:.3f} before "
            "training."
        )
    elif reading.rate == "perhaps too high":
        said.append(
            f"The learning rate may be too high: {clipped_share:.0%} of the steps had their gradient clipped and "
            f"training loss hardly fell ({reading.early_loss:.3f} to {reading.late_loss:.3f})."
        )
    if reading.fit == "over-fitting":
        said.append(
            f"Over-fitting from epoch {best.epoch:.3g}: after it validation loss rose to {last.loss:.3f} while "
            f"training loss went from {best.train_loss:.3f} to {last.train_loss:.3f}{_noise(best, last)}. The best "
            "checkpoint was kept."
        )
    elif reading.fit == "unstable":
        said.append(
            f"Unstable from epoch {best.epoch:.3g}: after it validation loss rose to {last.loss:.3f}, and training "
            f"loss from {best.train_loss:.3f} to {last.train_loss:.3f} with it{_noise(best, last)}. The best "
            "checkpoint was kept."
        )
    elif reading.fit == "under-fitting":
        said.append(
            f"Under-fitting: validation loss was still falling at the end ({validations[-2].loss:.3f} to "
            f"{last.loss:.3f} in the last stretch)."
        )
    elif reading.fit == "not carried over":
        said.append(
            f"What was learnt does not carry over: training loss fell to {last.train_loss:.3f}, but validation loss is "
            f"{last.loss:.3f}, {initial_loss:.3f} before training."
        )
    elif reading.fit == "nothing learnt":
        said.append("Hardly anything was learnt.")
    elif reading.fit == "levelled off":
        fits = ": the settings fit the data" if reading.rate == "fine" else ""
        said.append(f"Validation loss has levelled off (last {last.loss:.3f}){fits}.")
    return tuple(said)


def _fit(start: Validation, validations: Sequence[Validation], best: Validation, last: Validation) -> Fit:
    of_training = change(best.train_losses, last.train_losses)
    if _has_risen(best, last):
        if last.train_loss > best.train_loss if of_training is None else of_training.is_rise:
            return "unstable"
        if last.loss > last.train_loss or of_training is not None:  # else rows held out are still answered better
            return "over-fitting"
    if len(validations) > 1 and best is last and _still_falls(start, validations[-2], last):
        return "under-fitting"
    if not _has_fallen(start, best):
        learnt = change(start.train_losses, last.train_losses)
        fell = last.train_loss < start.loss * _LEARNT if learnt is None else learnt.is_fall
        return "not carried over" if fell else "nothing learnt"
    return "levelled off" if len(validations) > 1 else "one validation"


def _start(initial: Validation | float) -> Validation:
    return initial if isinstance(initial, Validation) else Validation(0.0, initial, initial)


def _has_risen(before: Validation, after: Validation) -> bool:
    found = change(before.losses, after.losses)
    return after.loss > before.loss * _RISE if found is None else found.is_rise


def _has_fallen(before: Validation, after: Validation) -> bool:
    found = change(before.losses, after.losses)
    return after.loss <= before.loss * _STILL_FALLING if found is None else found.is_fall


def _still_falls(start: Validation, before: Validation, last: Validation) -> bool:
    found = change(before.losses, last.losses)
    if found is None:
        return last.loss < before.loss * _STILL_FALLING
    return found.is_fall and before.loss - last.loss > _SHARE_STILL_FALLING * (start.loss - last.loss)


def _noise(best: Validation, last: Validation) -> str:
    """Return the rise with its standard error, where it is known, as words to go on with."""
    found: Change | None = change(best.losses, last.losses)
    return "" if found is None else f" ({found}, paired over {found.things} pictures)"
