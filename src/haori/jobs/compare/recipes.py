"""One recipe for several methods: what a method knows is kept, what it does not know is left out and said.

Everything outside the `method` section stays as it is, so data, token budget and early stopping are the same for all.
The learning rate is the one exception: a rate that suits adapters is about ten times too high for all weights, so a
given rate is not carried over between the two.
"""

from typing import Any, NamedTuple

from pydantic import ValidationError

from haori.core.errors import RecipeError, nearest
from haori.core.methods import METHODS
from haori.tasks.recipe import Recipe, recipe_from

__all__ = ["BASE", "DREAMBOOTH", "AdaptedRecipe", "adapt_recipe", "check_methods", "run_key", "with_run"]

BASE = "base"  # the bare base, measured beside the methods
DREAMBOOTH = "dreambooth"
"""Full fine-tuning of denoiser and text encoders, for pictures (Ruiz et al. 2023, arXiv 2208.12242)."""
_LONGEST_NAME = 100


class AdaptedRecipe(NamedTuple):
    """A recipe for one method, and a sentence for each thing that was changed besides."""

    recipe: Recipe
    notes: tuple[str, ...]


def check_methods(recipe: Recipe, methods: tuple[str, ...]) -> tuple[str, ...]:
    """Return the methods to train, in the order given, after checking their names.

    Raises:
        RecipeError: A name is unknown or given twice, or none is left to train.
    """
    known = (BASE, *METHODS, *((DREAMBOOTH,) if _has_text_encoders(recipe) else ()))
    for name in methods:
        if name not in known:
            hint = nearest(name, known) or f"known are {', '.join(known)}."
            raise RecipeError(f"There is no method {name!r} to compare; {hint}")
        if methods.count(name) > 1:
            raise RecipeError(f"The method {name!r} is given twice; name each once.")
    if "peft" in methods and recipe.method.kind != "peft":
        raise RecipeError("The method 'peft' needs a recipe that says which: set method.kind=peft and method.type.")
    trained = tuple(name for name in methods if name != BASE)
    if not trained:
        raise RecipeError("There is no method to train; name at least one besides base, such as lora.")
    return trained


def adapt_recipe(recipe: Recipe, kind: str) -> AdaptedRecipe:
    """Return the recipe with another method, keeping what the two methods share.

    Args:
        recipe: As the user gave it.
        kind: A key of `METHODS`.
    """
    if kind == DREAMBOOTH:
        full, notes = adapt_recipe(recipe, "full")
        document = full.model_dump(mode="json")
        document["training"]["text_encoder"] = True
        return AdaptedRecipe(recipe_from(document), notes)
    if recipe.method.kind == kind:
        return AdaptedRecipe(recipe, ())
    section = METHODS[kind]
    given = _given(recipe)
    kept = {key: value for key, value in given.items() if key in section.model_fields and _allowed(kind, key, value)}
    notes = tuple(
        f"{kind} is trained without method.{key}={value}, which it does not know."
        for key, value in given.items()
        if key not in kept
    )
    document = recipe.model_dump(mode="json")
    document["method"] = {"kind": kind, **kept}
    if recipe.optimizer.lr != "auto" and "full" in (kind, recipe.method.kind):
        document["optimizer"]["lr"] = "auto"
        notes += (
            f"{kind} is trained with an automatic learning rate: optimizer.lr={recipe.optimizer.lr:g} was given for "
            f"{recipe.method.kind}, and rates for adapters do not suit full fine-tuning.",
        )
    return AdaptedRecipe(recipe_from(document), notes)


def with_run(recipe: Recipe, seed: int, lr: float | None) -> Recipe:
    """Return the recipe of one run, named after its method and seed."""
    ending = f"-{recipe.method.kind}-seed-{seed}"
    document = recipe.model_dump(mode="json")
    document["name"] = recipe.name[: _LONGEST_NAME - len(ending)] + ending
    document["training"]["seed"] = seed
    if lr is not None:
        document["optimizer"]["lr"] = lr
    return recipe_from(document)


def run_key(method: str, lr: float | None, seed: int) -> str:
    """Return the name of a run in its comparison."""
    return f"{method}-lr-{'auto' if lr is None else f'{lr:.3g}'}-seed-{seed}"


def _has_text_encoders(recipe: Recipe) -> bool:
    return "text_encoder" in type(recipe.training).model_fields


def _given(recipe: Recipe) -> dict[str, Any]:
    """Return the method's values that differ from their defaults."""
    method = recipe.method
    values = method.model_dump(mode="json")
    plain = {key: field.get_default(call_default_factory=True) for key, field in type(method).model_fields.items()}
    return {
        key: value
        for key, value in values.items()
        if key != "kind" and getattr(method, key) != plain[key]
    }  # fmt: skip


def _allowed(kind: str, key: str, value: Any) -> bool:
    try:
        recipe_from({"name": "a", "base": "b", "data": {"path": "c"}, "method": {"kind": kind, key: value}})
    except (RecipeError, ValidationError):
        return False
    return True
