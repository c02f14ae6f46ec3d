"""Recipes whose paths hold wherever they are read later: by a resumed comparison, by a worker."""

from haori.core.user_path import user_path
from haori.tasks.recipe import Recipe

__all__ = ["absolute_path", "absolute_recipe"]


def absolute_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths of what is there."""
    data = recipe.data
    given = {key: getattr(data, key, None) for key in ("path", "validation", "regularisation", "mask_folder")}
    paths = {key: absolute_path(path) for key, path in given.items() if path is not None}
    found = recipe.model_copy(update={"data": data.model_copy(update=paths)})
    # A plain word may be a registered name, which goes before a folder of that name.
    return found.model_copy(update={"base": absolute_path(recipe.base)}) if "/" in recipe.base else found


def absolute_path(given: str | None) -> str | None:
    """Return an existing path as absolute; names of bases and hub ids stay as they are."""
    if given is None:
        return None
    path = user_path(given)
    return str(path.absolute()) if path.exists() else given
