"""Reads a run's figures and says in plain words what happened; `advice` says what to do about it.

Every sentence carries the numbers behind it. The thresholds are stated where they are used; they are rules of
thumb for losses that are likelihoods (nats per token, row or pair), not statistics.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

__all__ = ["Reading", "Validation", "diagnose", "read_curves"]

_RISE = 1.02  # validation loss counts as risen 2% above its best
_STILL_FALLING = 0.98  # and as still falling when the last validation won 2% or more

_LEARNT = 0.9  # training loss a tenth below the loss before training: something was learnt

Fit = Literal[
    "over-fitting", "unstable", "under-fitting", "not carried over", "nothing learnt", "levelled off", "one validation"
]
Rate = Literal["fine", "perhaps too high", "too high"]


class Validation(NamedTuple):
    """One validation: epochs done, validation loss, mean training loss since the last one."""

    epoch: float
    loss: float
    train_loss: float


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


def read_curves(
    initial_loss: float, validations: Sequence[Validation], step_losses: Sequence[float], clipped_share: float
) -> Reading:
    """Read the curves of a run with at least one validation.

    Args:
        initial_loss: Validation loss before the first step.
        validations: In order.
        step_losses: Training loss of each optimizer step.
        clipped_share: Share of steps whose gradient was cut to `max_grad_norm`.
    """
    best, last = min(validations, key=lambda v: v.loss), validations[-1]
    quarter = max(1, len(step_losses) // 4)
    early, late = sum(step_losses[:quarter]) / quarter, sum(step_losses[-quarter:]) / quarter
    rate: Rate = "fine"
    if best.loss > initial_loss * _RISE or late > 1.2 * early:
        rate = "too high"
    elif clipped_share > 0.9 and late > 0.9 * early and len(step_losses) >= 20:
        rate = "perhaps too high"
    return Reading(_fit(initial_loss, validations, best, last), rate, best, last, early, late)


def diagnose(
    initial_loss: float, validations: Sequence[Validation], step_losses: Sequence[float], clipped_share: float
) -> tuple[str, ...]:
    """Describe a run; the arguments are those of `read_curves`, and there may be no validation."""
    if not validations:
        return ("There was no validation, so nothing can be said about over- or under-fitting.",)
    reading = read_curves(initial_loss, validations, step_losses, clipped_share)
    best, last = reading.best, reading.last
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
            f"training loss went from {best.train_loss:.3f} to {last.train_loss:.3f}. The best checkpoint was kept."
        )
    elif reading.fit == "unstable":
        said.append(
            f"Unstable from epoch {best.epoch:.3g}: after it validation loss rose to {last.loss:.3f}, and training "
            f"loss from {best.train_loss:.3f} to {last.train_loss:.3f} with it. The best checkpoint was kept."
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


def _fit(initial_loss: float, validations: Sequence[Validation], best: Validation, last: Validation) -> Fit:
    if last.loss > best.loss * _RISE:
        if last.train_loss > best.train_loss:
            return "unstable"
        if last.loss > last.train_loss:  # else rows held out are still answered better than those trained on
            return "over-fitting"
    if len(validations) > 1 and best is last and last.loss < validations[-2].loss * _STILL_FALLING:
        return "under-fitting"
    if best.loss > initial_loss * _STILL_FALLING:
        return "not carried over" if last.train_loss < initial_loss * _LEARNT else "nothing learnt"
    return "levelled off" if len(validations) > 1 else "one validation"
