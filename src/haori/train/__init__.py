"""Training: one loop on Accelerate, one small file per task."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haori.train.display import TrainingDisplay
    from haori.train.memory import peak_memory_bytes
    from haori.train.plan import Plan, make_plan
    from haori.train.preparation import Prepared, prepare
    from haori.train.run import TrainedRun, resume_run, train_run

_HOMES = {
    "Plan": "plan",
    "Prepared": "preparation",
    "TrainedRun": "run",
    "TrainingDisplay": "display",
    "make_plan": "plan",
    "peak_memory_bytes": "memory",
    "prepare": "preparation",
    "resume_run": "run",
    "train_run": "run",
}
__all__ = [
    "Plan",
    "Prepared",
    "TrainedRun",
    "TrainingDisplay",
    "make_plan",
    "peak_memory_bytes",
    "prepare",
    "resume_run",
    "train_run",
]


def __getattr__(name: str) -> Any:
    """Load a name's module when it is first used."""
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(import_module(f"haori.train.{_HOMES[name]}"), name)


class _CallablePackage(ModuleType):
    """`haori.train` names this package and a function of `haori.api`; calling the package calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `haori.api.train`."""
        return import_module("haori.api").train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
