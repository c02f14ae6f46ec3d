"""Recipes outlive the code that wrote them: what older versions wrote is brought to today's keys, one step at a time.

A recipe says in `schema_version` which keys it was written with; one that does not say was written by Haori 0.1, or by
hand, with any. So a migration changes a key only where it finds the old one, and leaves a recipe alone that has the
new one already. Whoever renames a key, or gives a value another meaning, raises `RECIPE_SCHEMA` and adds a migration.
"""

from collections.abc import Callable, Mapping
from typing import Any

from haori.core.errors import RecipeError

__all__ = ["RECIPE_SCHEMA", "migrate_recipe"]

RECIPE_SCHEMA = 1

_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""What turns a recipe of one version into one of the next, by the version it takes."""


def migrate_recipe(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe, as plain data, with today's keys and `schema_version`.

    Raises:
        RecipeError: A newer Haori wrote it.
    """
    migrated = dict(document)
    version = migrated.pop("schema_version", 1)
    if type(version) is not int or not 1 <= version <= RECIPE_SCHEMA:
        raise RecipeError(
            f"The recipe's 'schema_version' cannot be {version!r}; this Haori reads recipes up to {RECIPE_SCHEMA}. A "
            "newer one wrote it: upgrade Haori."
        )
    for step in range(version, RECIPE_SCHEMA):
        migrated = _MIGRATIONS[step](migrated)
    return {"schema_version": RECIPE_SCHEMA, **migrated}
