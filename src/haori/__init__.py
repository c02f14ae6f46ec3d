"""Haori: LoRA from raw data to production.

    import haori

    run = haori.train(base="smollm2-135m-instruct", data="my.jsonl", name="support")
    print(run.record.diagnosis)
    support = haori.open_adapter("support")
    print(support.answer("My parcel has not come."))
    result, report = haori.evaluate("support", "test.jsonl")

Importing this module is light; torch is loaded by the first call that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from haori.api import compare, evaluate, resume, train
from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.bases import Base, find_base
    from haori.core.errors import HaoriError
    from haori.evaluation import EvaluationResult
    from haori.jobs.tenants.client import TrainingClient, training_client
    from haori.library import Library, OpenAdapter, StoredAdapter, import_adapter, open_adapter
    from haori.tasks.classification.classifier import open_classifier
    from haori.tasks.recipe import Recipe, load_recipe
    from haori.training import TrainedRun

__all__ = [
    "Base",
    "EvaluationResult",
    "HaoriError",
    "Library",
    "OpenAdapter",
    "Recipe",
    "StoredAdapter",
    "TrainedRun",
    "TrainingClient",
    "compare",
    "evaluate",
    "find_base",
    "import_adapter",
    "load_recipe",
    "open_adapter",
    "open_classifier",
    "resume",
    "train",
    "training_client",
]

_load = lazy_exports(
    __name__,
    {
        "bases": ("Base", "find_base"),
        "core.errors": ("HaoriError",),
        "tasks.recipe": ("Recipe", "load_recipe"),
        "jobs.tenants.client": ("TrainingClient", "training_client"),
        "evaluation": ("EvaluationResult",),
        "library": ("Library", "OpenAdapter", "StoredAdapter", "import_adapter", "open_adapter"),
        "tasks.classification.classifier": ("open_classifier",),
        "training": ("TrainedRun",),
    },
)


def __getattr__(name: str) -> Any:
    """Load a name's package when it is first used."""
    if name == "__version__":
        return import_module("importlib.metadata").version("haori")
    return _load(name)
