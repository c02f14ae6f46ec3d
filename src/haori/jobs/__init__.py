"""Work that takes more than one run: child processes, comparisons of methods, sweeps.

Exports are lazy: importing the package loads neither torch nor numpy.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.jobs.compare.comparison import compare_methods, resume_comparison
    from haori.jobs.compare.records import Comparison
    from haori.jobs.compare.show import show_comparison
    from haori.jobs.process import JobResult, JobSpec, run_job

__all__ = [
    "Comparison",
    "JobResult",
    "JobSpec",
    "compare_methods",
    "resume_comparison",
    "run_job",
    "show_comparison",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "compare.comparison": ("compare_methods", "resume_comparison"),
        "compare.records": ("Comparison",),
        "compare.show": ("show_comparison",),
        "process": ("JobResult", "JobSpec", "run_job"),
    },
)
