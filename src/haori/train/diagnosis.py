"""Reads a finished run's figures and says in plain words what happened and what to try.

Every sentence carries the numbers behind it. The thresholds are stated where they are used; they are rules of
thumb for loss in nats per token, not statistics.
"""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Validation", "diagnose"]

_RISE = 1.02  # validation loss counts as risen 2% above its best
_STILL_FALLING = 0.98  # and as still falling when the last validation won 2% or more


class Validation(NamedTuple):
    """One validation: epochs done, validation loss, mean training loss since the last one (nats per token)."""

    epoch: float
    loss: float
    train_loss: float


def diagnose(
    initial_loss: float, validations: Sequence[Validation], step_losses: Sequence[float], clipped_share: float
) -> tuple[str, ...]:
    """Describe a run.

    Args:
        initial_loss: Validation loss before the first step.
        validations: In order.
        step_losses: Training loss of each optimizer step.
        clipped_share: Share of steps whose gradient was cut to `max_grad_norm`.
    """
    if not validations:
        return ("There was no validation, so nothing can be said about over- or under-fitting.",)
    best = min(validations, key=lambda v: v.loss)
    last = validations[-1]
    said = [f"Validation loss went from {initial_loss:.3f} to {best.loss:.3f} at epoch {best.epoch:.3g}."]
    said += _learning_rate(initial_loss, best, step_losses, clipped_share)
    if last.loss > best.loss * _RISE and last.train_loss <= best.train_loss:
        said.append(
            f"Over-fitting from epoch {best.epoch:.3g}: after it validation loss rose to {last.loss:.3f} while "
            f"training loss fell from {best.train_loss:.3f} to {last.train_loss:.3f}. The best checkpoint was kept; "
            "fewer epochs, more data, a smaller rank or dropout 0.05 would help."
        )
    elif len(validations) > 1 and best is last and last.loss < validations[-2].loss * _STILL_FALLING:
        said.append(
            f"Under-fitting: validation loss was still falling at the end ({validations[-2].loss:.3f} to "
            f"{last.loss:.3f} in the last stretch); more epochs would help."
        )
    elif best.loss > initial_loss * _STILL_FALLING:
        said.append(
            "Hardly anything was learnt: check with `haori data check` what is trained on, or raise optimizer.lr or "
            "the rank."
        )
    elif len(validations) > 1:
        said.append(f"Validation loss has levelled off (last {last.loss:.3f}): the settings fit the data.")
    return tuple(said)


def _learning_rate(
    initial_loss: float, best: Validation, step_losses: Sequence[float], clipped_share: float
) -> list[str]:
    quarter = max(1, len(step_losses) // 4)
    early = sum(step_losses[:quarter]) / quarter
    late = sum(step_losses[-quarter:]) / quarter
    if best.loss > initial_loss * _RISE or late > 1.2 * early:
        return [
            f"The learning rate is too high: training loss went from {early:.3f} (first quarter) to {late:.3f} (last), "
            f"best validation {best.loss:.3f} against {initial_loss:.3f} before training; try a third of it."
        ]
    if clipped_share > 0.9 and late > 0.9 * early and len(step_losses) >= 20:
        return [
            f"{clipped_share:.0%} of the steps had their gradient clipped and training loss hardly fell "
            f"({early:.3f} to {late:.3f}): the learning rate may be too high; try half of it."
        ]
    return []
