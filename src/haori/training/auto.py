"""Chooses what a recipe leaves as `auto`, by rules a person can read, each with its reason.

The rules (docs/guide/choosing-settings.md explains them):

    rank         8 under 500 rows, 16 under 5,000, else 32: more data can fill more capacity
    initial rank 1.5 times the rank (AdaLoRA): what is spread over modules at first is more than what remains
    alpha        twice the (initial) rank, so the scale alpha/rank stays 2 and the learning rate carries over;
                 8 with rsLoRA, whose scale alpha/sqrt(rank) is then 2 at rank 16
    dropout      0, unless the task chooses otherwise
    lr           5e-4 under 0.5B parameters, 2e-4 under 14B, else 1e-4: about ten times a full fine-tuning's;
                 a tenth of it for full fine-tuning, a fifth for PiSSA and OLoRA, four times for a head alone,
                 ten times for AdaLoRA and for methods that train few numbers, divided by sqrt(lr_ratio) for LoRA+
    weights      fp32 in full fine-tuning, or bf16 if training.dtype is set to it
    epochs       10 under 200 rows, 3 under 2,000, 2 under 20,000, else 1; early stopping ends them sooner
    validations  at least four over the run: 4 / epochs per epoch, rounded up

What a step and a microbatch hold is the task's choice (tasks/token_budgets.py for text).
"""

import math
from collections.abc import Callable
from typing import Any

from haori.adapters.learning_rates import rate_factor
from haori.core.methods import AdaloraMethod, FullMethod, HeadMethod, LowRankMethod, Method, PeftMethod
from haori.tasks.recipe import Recipe
from haori.tasks.task import Choice

__all__ = ["resolve"]

_Choose = Callable[[str, Any, Any, str], Any]
_NO_DROPOUT = "it costs time and helps little on most data; try 0.05 against over-fitting"


def resolve(recipe: Recipe, rows: int, parameters: int, dtype: tuple[str, str]) -> tuple[Recipe, tuple[Choice, ...]]:
    """Return the recipe with every `auto` replaced, and the choices made.

    Args:
        recipe: As the user gave it.
        rows: Training rows.
        parameters: Of the base.
        dtype: Name and reason of the dtype to train in.
    """
    choices: list[Choice] = []

    def choose(key: str, given: Any, value: Any, reason: str) -> Any:
        if given != "auto":
            return given
        choices.append(Choice(key, value, reason))
        return value

    training = recipe.training
    method = _method(recipe.method, rows, choose)
    if isinstance(method, FullMethod):
        weights = choose("method.weights", method.weights, *_weights(training.dtype))
        method = method.model_copy(update={"weights": weights})
    lr = choose("optimizer.lr", recipe.optimizer.lr, *_lr(parameters, method))
    epochs = choose("training.epochs", training.epochs, *_epochs(rows))
    validations = choose("training.evaluations_per_epoch", training.evaluations_per_epoch, *_validations(epochs))
    kind = choose("training.dtype", training.dtype, *dtype)
    resolved = recipe.model_copy(
        update={
            "method": method,
            "optimizer": recipe.optimizer.model_copy(update={"lr": lr}),
            "training": training.model_copy(
                update={
                    "epochs": epochs,
                    "evaluations_per_epoch": validations,
                    "dtype": kind,
                }
            ),
        }
    )
    return resolved, tuple(choices)


def _rank(rows: int) -> tuple[int, str]:
    rank = 8 if rows < 500 else 16 if rows < 5_000 else 32
    return rank, f"{rows:,} training rows (8 under 500, 16 under 5,000, else 32)"


def _method(method: Method, rows: int, choose: _Choose) -> Method:
    """Resolve rank and alpha of the methods that have them."""
    if isinstance(method, FullMethod | HeadMethod | PeftMethod):
        return method
    rank = choose("method.rank", method.rank, *_rank(rows))
    method = method.model_copy(update={"dropout": choose("method.dropout", method.dropout, 0.0, _NO_DROPOUT)})
    if isinstance(method, AdaloraMethod):
        first = math.ceil(1.5 * rank)
        initial = choose("method.initial_rank", method.initial_rank, first, "1.5 times the rank that remains")
        alpha = choose("method.alpha", method.alpha, 2.0 * initial, "twice the initial rank")
        return method.model_copy(update={"rank": rank, "initial_rank": initial, "alpha": alpha})
    if isinstance(method, LowRankMethod) and method.rslora:
        found = 8.0, "with alpha/sqrt(rank) the scale is 2 at rank 16, and falls slowly with the rank"
    else:
        found = 2.0 * rank, "twice the rank"
    return method.model_copy(update={"rank": rank, "alpha": choose("method.alpha", method.alpha, *found)})


def _weights(dtype: str) -> tuple[str, str]:
    """Return the number format of fully trained weights; `dtype` is the run's, as it was asked for."""
    if dtype == "bf16":
        return "bf16", "as training.dtype; steps under 1/256 of a weight are lost, which fp32 would keep"
    return "fp32", "small steps would be lost in 16 bits; products are computed in training.dtype all the same"


def _lr(parameters: int, method: Method) -> tuple[float, str]:
    """Return LoRA's rate for this size of base, times the factor of the method."""
    lr = 5e-4 if parameters < 0.5e9 else 2e-4 if parameters < 14e9 else 1e-4
    reason = f"the base has {parameters / 1e6:,.0f}M parameters (5e-4 under 0.5B, 2e-4 under 14B, else 1e-4)"
    factor, why = rate_factor(method)
    return float(f"{lr * factor:.3g}"), f"{reason}{why}"


def _epochs(rows: int) -> tuple[int, str]:
    epochs = 10 if rows < 200 else 3 if rows < 2_000 else 2 if rows < 20_000 else 1
    return epochs, f"{rows:,} training rows; at most, since early stopping watches validation loss"


def _validations(epochs: int) -> tuple[int, str]:
    return math.ceil(4 / epochs), "at least four over the run"
