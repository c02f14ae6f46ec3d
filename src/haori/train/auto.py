"""Chooses what a recipe leaves as `auto`, by rules a person can read, each with its reason.

The rules (docs/guide/choosing-settings.md explains them):

    rank         8 under 500 rows, 16 under 5,000, else 32: more data can fill more capacity
    alpha        twice the rank, so the scale alpha/rank stays 2 and the learning rate carries over
    lr           5e-4 under 0.5B parameters, 2e-4 under 14B, else 1e-4: about ten times a full fine-tuning's
    epochs       10 under 200 rows, 3 under 2,000, 2 under 20,000, else 1; early stopping ends them sooner
    validations  at least four over the run: 4 / epochs per epoch, rounded up
    batch        rows/40 rows per step, between 4 and 32, so that an epoch has enough steps to learn from
    micro batch  768 tokens on a CPU, 8,192 on a GPU, never less than the longest row
"""

import math
from typing import NamedTuple

from haori.core.recipe import Recipe

__all__ = ["Choice", "DataFacts", "resolve"]


class DataFacts(NamedTuple):
    """What the rules need to know about the training split."""

    rows: int
    mean_tokens: float
    longest_tokens: int
    max_length: int


class Choice(NamedTuple):
    """One resolved value: dotted key, value, and why."""

    key: str
    value: int | float | str
    reason: str


def resolve(
    recipe: Recipe, facts: DataFacts, parameters: int, device: str, dtype: tuple[str, str]
) -> tuple[Recipe, tuple[Choice, ...]]:
    """Return the recipe with every `auto` replaced, and the choices made.

    Args:
        recipe: As the user gave it.
        facts: Of the training split.
        parameters: Of the base.
        device: `cpu` or `cuda`.
        dtype: Name and reason of the dtype to train in.
    """
    choices: list[Choice] = []

    def choose(key: str, given: object, value: int | float | str, reason: str) -> object:
        if given != "auto":
            return given
        choices.append(Choice(key, value, reason))
        return value

    method, training = recipe.method, recipe.training
    rank = choose("method.rank", method.rank, *_rank(facts.rows))
    assert isinstance(rank, int)
    alpha = choose("method.alpha", method.alpha, 2.0 * rank, "twice the rank")
    lr = choose("optimizer.lr", recipe.optimizer.lr, *_lr(parameters))
    epochs = choose("training.epochs", training.epochs, *_epochs(facts.rows))
    assert isinstance(epochs, int)
    validations = choose("training.evaluations_per_epoch", training.evaluations_per_epoch, *_validations(epochs))
    batch = choose("training.batch_tokens", training.batch_tokens, *_batch_tokens(facts))
    micro = choose("training.micro_batch_tokens", training.micro_batch_tokens, *_micro_batch_tokens(facts, device))
    max_length = choose(
        "data.max_length", recipe.data.max_length, facts.max_length, "the base's context, at most 2,048"
    )
    kind = choose("training.dtype", training.dtype, *dtype)
    resolved = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"max_length": max_length}),
            "method": method.model_copy(update={"rank": rank, "alpha": alpha}),
            "optimizer": recipe.optimizer.model_copy(update={"lr": lr}),
            "training": training.model_copy(
                update={
                    "epochs": epochs,
                    "evaluations_per_epoch": validations,
                    "batch_tokens": batch,
                    "micro_batch_tokens": micro,
                    "dtype": kind,
                }
            ),
        }
    )
    return resolved, tuple(choices)


def _rank(rows: int) -> tuple[int, str]:
    rank = 8 if rows < 500 else 16 if rows < 5_000 else 32
    return rank, f"{rows:,} training rows (8 under 500, 16 under 5,000, else 32)"


def _lr(parameters: int) -> tuple[float, str]:
    lr = 5e-4 if parameters < 0.5e9 else 2e-4 if parameters < 14e9 else 1e-4
    return (
        lr,
        f"the base has {parameters / 1e6:,.0f}M parameters (5e-4 under 0.5B, 2e-4 under 14B, else 1e-4)",
    )


def _epochs(rows: int) -> tuple[int, str]:
    epochs = 10 if rows < 200 else 3 if rows < 2_000 else 2 if rows < 20_000 else 1
    return epochs, f"{rows:,} training rows; at most, since early stopping watches validation loss"


def _batch_tokens(facts: DataFacts) -> tuple[int, str]:
    rows = min(32, max(4, round(facts.rows / 40)))
    tokens = max(round(rows * facts.mean_tokens), facts.longest_tokens)
    return tokens, f"about {rows} rows of {facts.mean_tokens:.0f} tokens per optimizer step"


def _micro_batch_tokens(facts: DataFacts, device: str) -> tuple[int, str]:
    limit, where = (768, "a CPU") if device == "cpu" else (8192, "a GPU")
    reason = f"{limit:,} tokens at once keep {where} busy; never less than the longest row ({facts.longest_tokens})"
    return max(limit, facts.longest_tokens), reason


def _validations(epochs: int) -> tuple[int, str]:
    return math.ceil(4 / epochs), "at least four over the run"
