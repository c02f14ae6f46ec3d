"""Haori: LoRA from raw data to production.

    import haori

    run = haori.train(base="smollm2-135m-instruct", data="my.jsonl", name="support")
    print(run.record.diagnosis)
    support = haori.open_adapter("support")
    print(support.answer("My parcel has not come."))
    result, report = haori.evaluate("support", "test.jsonl")

`haori.train` and `haori.evaluate` are also packages; once imported, calling the package calls the function.
Importing this module is light; torch is loaded by the first call that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from haori.api import compare, evaluate, resume, train

if TYPE_CHECKING:
    from haori.bases import Base, find_base
    from haori.core.errors import HaoriError
    from haori.core.recipe import Recipe, load_recipe
    from haori.evaluate import EvaluationResult
    from haori.library import Library, OpenAdapter, StoredAdapter, import_adapter, open_adapter
    from haori.train import TrainedRun

__all__ = [
    "Base",
    "EvaluationResult",
    "HaoriError",
    "Library",
    "OpenAdapter",
    "Recipe",
    "StoredAdapter",
    "TrainedRun",
    "compare",
    "evaluate",
    "find_base",
    "import_adapter",
    "load_recipe",
    "open_adapter",
    "resume",
    "train",
]

_HOMES = {
    "Base": "bases",
    "EvaluationResult": "evaluate",
    "HaoriError": "core.errors",
    "Library": "library",
    "OpenAdapter": "library",
    "Recipe": "core.recipe",
    "StoredAdapter": "library",
    "TrainedRun": "train",
    "find_base": "bases",
    "import_adapter": "library",
    "load_recipe": "core.recipe",
    "open_adapter": "library",
}


def __getattr__(name: str) -> Any:
    """Load a name's package when it is first used."""
    if name == "__version__":
        return import_module("importlib.metadata").version("haori")
    if name not in _HOMES:
        raise AttributeError(f"module 'haori' has no attribute {name!r}")
    return getattr(import_module(f"haori.{_HOMES[name]}"), name)
