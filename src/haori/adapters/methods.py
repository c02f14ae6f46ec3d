"""The methods of a recipe, by kind: one module each, found here and nowhere else.

A method's module offers three functions, which are what `MethodModule` lists. Nothing else in the package knows a
method by name; a new one is a section in `core/methods.py`, a module, and a line in `_MODULES`.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from haori.adapters.insertion import Insertion, refuse_dead

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from haori.adapters.behaviour import Behaviour
    from haori.core.methods import Method

__all__ = ["MethodModule", "behaviour_of", "check_method", "check_plan", "insert_method"]

_MODULES = {
    "lora": "lora",
    "dora": "dora",
    "adalora": "adalora",
    "ard_lora": "ard_lora",
    "qlora": "qlora",
    "full": "full",
    "head": "head",
    "peft": "peft_method",
}


class MethodModule(Protocol):
    """What the module of a method offers; `method` is always the section of its own kind.

    It may offer `check_plan(model, method, targets, steps)` too.
    """

    def check(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: Any, targets: Sequence[str]
    ) -> None:
        """Raise an InputError for what cannot be trained on this base; `model` may be a skeleton without weights."""

    def insert(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        method: Any,
        targets: Sequence[str],
        insertion: Insertion,
    ) -> "nn.Module":
        """Freeze what is not trained, insert what is, and return the model to train."""

    def behaviour(self, model: "nn.Module", method: Any, steps: int) -> "Behaviour":
        """Return what the method adds to a training step; `steps` is the planned number of optimizer steps."""


def check_method(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: "Method", targets: Sequence[str]
) -> None:
    """Check a method against a base before its weights are loaded.

    Args:
        model: The base; a skeleton without weights will do.
        tokenizer: Its tokenizer.
        method: A section of a recipe; rank and alpha may still be `auto`.
        targets: Full names of the modules to adapt; none for full fine-tuning.

    Raises:
        InputError: The method does not go with the base.
        MissingExtraError: The method needs a package that is not installed.
    """
    _module_of(method).check(model, tokenizer, method, targets)


def check_plan(model: "PreTrainedModel", method: "Method", targets: Sequence[str], steps: int) -> None:
    """Check what is known only when the data is: the resolved ranks, and schedules that need steps enough.

    Args:
        model: The base; a skeleton without weights will do.
        method: The section with every `auto` resolved.
        targets: Full names of the modules to adapt.
        steps: Planned number of optimizer steps.

    Raises:
        InputError: The method cannot be trained so.
    """
    check = getattr(_module_of(method), "check_plan", None)
    if check is not None:
        check(model, method, targets, steps)


def insert_method(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: "Method",
    targets: Sequence[str],
    insertion: Insertion,
) -> "nn.Module":
    """Turn a loaded base into the model to train: a PeftModel, or for full fine-tuning the base itself.

    Args:
        model: The base with its weights; it is changed in place.
        tokenizer: Its tokenizer.
        method: The section with every `auto` resolved.
        targets: Full names of the modules to adapt.
        insertion: Seed, planned steps, first batches, and what PEFT calls the task.

    Raises:
        InputError: The method cannot be inserted, or begins in a state from which nothing can be learnt.
    """
    trained = _module_of(method).insert(model, tokenizer, method, targets, insertion)
    refuse_dead(trained)
    return trained


def behaviour_of(model: "nn.Module", method: "Method", steps: int) -> "Behaviour":
    """Return what the method adds to the training steps of `model`, which `insert_method` made.

    Args:
        model: The model to train, not wrapped by Accelerate.
        method: The resolved section.
        steps: Planned number of optimizer steps.
    """
    return _module_of(method).behaviour(model, method, steps)


def _module_of(method: "Method") -> MethodModule:
    return cast(MethodModule, import_module(f"haori.adapters.{_MODULES[method.kind]}"))
