"""From what a client asks for to a recipe: hyperparameters as OpenAI calls them, `lora`, and keys of the recipe.

A client names no file: what would read or write one, or send something elsewhere, is refused by its key.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from haori.core.errors import InputError
from haori.core.records import Record

__all__ = ["Hyperparameters", "Wanted", "recipe_document"]

Number = Literal["auto"] | int
_METHODS = ("lora", "dora", "qlora", "adalora", "ard_lora")
_OURS = {
    "name": "the job names its adapter", "base": "'model' says that", "from": "'model' says that",
    "revision": "a registered base has one", "task": "'method' says that", "schema_version": "it is this version's",
    "data.path": "'training_file' says that", "data.validation": "'validation_file' says that",
    "data.split": "a file has none", "data.revision": "a file has none",
    "training.trackers": "figures are in the job's events and its result file",
}  # fmt: skip
_LORA = {"rank": "rank", "r": "rank", "alpha": "alpha", "dropout": "dropout", "targets": "target"}
_KEPT = 3


class Hyperparameters(Record):
    """As OpenAI calls them."""

    n_epochs: Number = "auto"
    batch_size: Number = "auto"
    learning_rate_multiplier: Literal["auto"] | float = "auto"
    beta: Literal["auto"] | float = "auto"


class Wanted(Record):
    """What is to be trained, once names have been looked up.

    Attributes:
        name: Of the adapter in the library.
        base: Spec of the base.
        start: Adapter of the library to go on from.
        method: What is learnt from: conversations, or pairs.
        checkpoints: How many are kept, the last of those that are saved; so many at least are. None for the usual.
        lora: Rank, alpha, dropout and targets.
        recipe: Further keys of the recipe, nested or dotted.
    """

    name: str
    base: str
    start: str | None = None
    method: Literal["supervised", "dpo"] = "supervised"
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    seed: int = 0
    validates: bool = False
    checkpoints: int | None = None
    lora: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)


def recipe_document(wanted: Wanted, training_file: str, validation_file: str | None) -> dict[str, Any]:
    """Return the recipe as JSON data, checked.

    Args:
        wanted: What was asked for.
        training_file: Path of the rows.
        validation_file: Path of those to validate with.

    Raises:
        InputError: A key may not be given here.
        RecipeError: A key or value is wrong.
    """
    from haori.tasks.recipe import recipe_from

    asked = wanted.hyperparameters
    document: dict[str, Any] = {
        "name": wanted.name,
        "base": wanted.base,
        "task": "causal_lm" if wanted.method == "supervised" else "preference",
        "data": {"path": training_file},
        "training": {"epochs": asked.n_epochs, "seed": wanted.seed, "keep_checkpoints": wanted.checkpoints or _KEPT},
    }
    if wanted.start is not None:
        document["from"] = wanted.start
    if validation_file is None:
        document["data"]["validation_share"] = 0.0  # all rows that were sent are learnt from
    else:
        document["data"]["validation"] = validation_file
    if asked.beta != "auto":
        if wanted.method != "dpo":
            raise InputError("'beta' is for the method dpo; leave it out.")
        document["loss"] = {"kind": "dpo", "beta": asked.beta}
    document["method"] = _lora(wanted.lora)
    _merge(document, _nested(wanted.recipe))
    if not document["method"]:
        del document["method"]
    return recipe_from(document).model_dump(mode="json")


def _lora(given: Mapping[str, Any]) -> dict[str, Any]:
    if wrong := next((key for key in given if key not in _LORA), None):
        raise InputError(f"'lora' has no key {wrong[:80]!r}; it has rank, alpha, dropout and targets.")
    return {_LORA[key]: float(value) if key == "alpha" and isinstance(value, int) else value
            for key, value in given.items()}  # fmt: skip


def _nested(given: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return keys of a recipe as sections, refusing those that are not the client's to set."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        dotted = f"{before}{key}"
        head, _, rest = str(key).partition(".")
        inner = {rest: value} if rest else value
        if reason := _OURS.get(dotted):
            raise InputError(f"'recipe' cannot set {dotted!r} here: {reason}.")
        if dotted == "method.kind" and value not in _METHODS:
            raise InputError(f"'recipe' cannot set 'method.kind' to {value!r}; allowed are {', '.join(_METHODS)}.")
        if isinstance(inner, dict) and (rest or not before):
            _merge(found, {head: _nested(inner, f"{before}{head}.")})
        else:
            found[head] = inner
    return found


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
