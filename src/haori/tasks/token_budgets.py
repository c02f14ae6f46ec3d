"""How many tokens a step and a microbatch hold, chosen by rules a person can read, each with its reason."""

from collections.abc import Sequence
from typing import NamedTuple

from haori.tasks.recipe import TokenTraining
from haori.tasks.task import Choice

__all__ = ["Lengths", "choose_budgets"]


class Lengths(NamedTuple):
    """Row lengths in tokens: of the training rows their number and mean, and the longest of all rows."""

    rows: int
    mean: float
    longest: int

    @classmethod
    def of(cls, train: Sequence[int], validation: Sequence[int]) -> "Lengths":
        """Look at the lengths of both parts of a split."""
        return cls(len(train), sum(train) / len(train), max([*train, *validation]))


def choose_budgets(training: TokenTraining, lengths: Lengths, device: str) -> tuple[TokenTraining, tuple[Choice, ...]]:
    """Replace `auto` in `batch_tokens` and `micro_batch_tokens`.

    Args:
        training: The section as it was given.
        lengths: Of the rows.
        device: `cpu` or `cuda`.
    """
    found: dict[str, tuple[int, str]] = {}
    if training.batch_tokens == "auto":
        found["batch_tokens"] = _batch_tokens(lengths)
    if training.micro_batch_tokens == "auto":
        found["micro_batch_tokens"] = _micro_batch_tokens(lengths, device)
    choices = tuple(Choice(f"training.{key}", value, reason) for key, (value, reason) in found.items())
    return training.model_copy(update={key: value for key, (value, _) in found.items()}), choices


def _batch_tokens(lengths: Lengths) -> tuple[int, str]:
    rows = min(32, max(4, round(lengths.rows / 40)))
    tokens = max(round(rows * lengths.mean), lengths.longest)
    return tokens, f"about {rows} rows of {lengths.mean:.0f} tokens per optimizer step"


def _micro_batch_tokens(lengths: Lengths, device: str) -> tuple[int, str]:
    limit, where = (2048, "a CPU") if device == "cpu" else (8192, "a GPU")
    reason = f"{limit:,} tokens at once keep {where} busy; never less than the longest row ({lengths.longest})"
    return max(limit, lengths.longest), reason
