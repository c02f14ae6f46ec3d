"""Training: one loop on Accelerate, one small file per task."""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.training.display import TrainingDisplay
    from haori.training.memory import peak_memory_bytes
    from haori.training.plan import Plan, make_plan
    from haori.training.preparation import Prepared, prepare
    from haori.training.run import TrainedRun, resume_run, train_run

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

__getattr__ = lazy_exports(
    __name__,
    {
        "display": ("TrainingDisplay",),
        "memory": ("peak_memory_bytes",),
        "plan": ("Plan", "make_plan"),
        "preparation": ("Prepared", "prepare"),
        "run": ("TrainedRun", "resume_run", "train_run"),
    },
)
