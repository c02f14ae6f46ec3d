"""The task of a configuration: what asks for a task that recipes have is carried to it, anything else is refused.

A recipe of another task would train something else than the file asks for, so nothing is bent. What was carried to a
section that recipes of the task do not have is taken back and left.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from haori.conversion.draft import Draft
from haori.core.errors import RecipeError
from haori.tasks.registry import TASKS, recipe_class

__all__ = ["choose_task", "combine_loss", "known_keys"]

_TEXT = "causal_lm"
_LOSSES: Mapping[str, str] = {
    "dpo": "dpo", "sigmoid": "dpo", "ipo": "ipo", "hinge": "hinge", "orpo": "orpo", "simpo": "simpo", "kto": "kto",
}  # fmt: skip
"""Losses of preference training as other tools write them, and as recipes do."""
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "dpo": {"beta": "beta", "label_smoothing": "label_smoothing"},
    "ipo": {"beta": "beta"},
    "hinge": {"beta": "beta"},
    "orpo": {"beta": "beta", "orpo_alpha": "beta"},
    "simpo": {"beta": "beta", "gamma": "gamma"},
    "kto": {"beta": "beta", "desirable": "desirable_weight", "undesirable": "undesirable_weight"},
}
"""Facts that each loss has a key for."""
_FACTS = ("beta", "label_smoothing", "gamma", "desirable", "undesirable", "orpo_alpha")
_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("", "pretraining"), _TEXT),
    **dict.fromkeys(_LOSSES, "preference"),
    **dict.fromkeys(("seq_cls", "token_cls"), "classification"),
}
_PROBLEMS: Mapping[str, str] = {
    "single_label_classification": "single_label", "multi_label_classification": "multi_label",
}  # fmt: skip
_OTHERS: Mapping[str, str] = {
    **dict.fromkeys(("rm", "reward model", "process reward model"), "the training of a reward model"),
    **dict.fromkeys(("ppo", "grpo", "gdpo", "gkd"), "reinforcement learning or distillation"),
}


def choose_task(draft: Draft, path: Path) -> str:
    """Settle the facts `task` and `loss_name` (of preference training), and return the task of the recipe.

    Raises:
        RecipeError: Recipes have no such task.
    """
    value = str(draft.value("task", "")).lower()
    if value == "dpo" and draft.has("loss_name"):
        value = str(draft.value("loss_name")).lower()
    task = _NAMES.get(value, "")
    if task not in TASKS:
        asked = _OTHERS.get(value, task or "another task")
        raise RecipeError(
            f"{draft.key('task')!r} in {str(path)!r} asks for {asked} ({value}), which is not carried over: a recipe "
            f"of this file would train something else. Recipes have the task {' or '.join(TASKS)}."
        )
    if task == "preference":
        draft.carry(("task", "loss_name"), {"task": task, "loss.kind": _LOSSES[value]})
        draft.forget("data.too_long", {"truncate"}, "pairs are not cut off, but dropped")
    elif task == "classification":
        draft.carry("task", {"task": task, "data.problem": "token"} if value == "token_cls" else {"task": task})
        _problem(draft)
    elif value != "pretraining":
        draft.unneeded("task", "texts are trained on, as here")
    for fact in ("problem", "label_count"):
        draft.leave(fact, "it belongs to classification")
    draft.leave("loss_name", "it belongs to preference training")
    return task


def _problem(draft: Draft) -> None:
    """Settle the facts `problem` and `label_count` of a classifier."""
    draft.unneeded("label_count", "the labels are those of the data")
    found = _PROBLEMS.get(str(draft.value("problem")))
    if found and "data.problem" not in draft.ours:
        draft.carry("problem", {"data.problem": found})
    draft.leave("problem", f"labels are names here, and {draft.value('problem')} is not learnt", "data.problem")


def combine_loss(draft: Draft, task: str) -> None:
    """Settle the facts about the loss of preference training."""
    kind = draft.ours.get("loss.kind", "") if task == "preference" else ""
    options = _OPTIONS.get(kind, {})
    for fact in _FACTS:
        if fact in options and f"loss.{options[fact]}" not in draft.ours:
            draft.carry(fact, {f"loss.{options[fact]}": draft.value(fact)} if draft.has(fact) else {})
        draft.leave(fact, f"the loss {kind} has no such key" if kind else "it belongs to preference training")


def known_keys(task: str) -> frozenset[str]:
    """Return the dotted keys that recipes of a task have, besides those of its method and its loss."""
    return frozenset(_fields(recipe_class(task)))


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{field.alias or name}"
        for kind in _models(field.annotation):
            yield from _fields(kind, f"{prefix}{name}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
