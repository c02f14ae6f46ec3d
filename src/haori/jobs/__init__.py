"""Work that takes more than one run: child processes, comparisons of methods, sweeps.

Exports are lazy: importing the package loads neither torch nor numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haori.jobs.compare import compare_methods, resume_comparison
    from haori.jobs.compare_folder import Watch
    from haori.jobs.compare_records import Comparison
    from haori.jobs.compare_show import show_comparison
    from haori.jobs.process import JobResult, JobSpec, run_job

_HOMES = {
    "Comparison": "compare_records",
    "JobResult": "process",
    "JobSpec": "process",
    "Watch": "compare_folder",
    "compare_methods": "compare",
    "resume_comparison": "compare",
    "run_job": "process",
    "show_comparison": "compare_show",
}
__all__ = [
    "Comparison",
    "JobResult",
    "JobSpec",
    "Watch",
    "compare_methods",
    "resume_comparison",
    "run_job",
    "show_comparison",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
