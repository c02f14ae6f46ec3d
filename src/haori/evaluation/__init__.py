"""Measure an adapter on data, against its base, with intervals; write the report.

Exports are lazy: importing the package loads neither torch nor numpy.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.evaluation.evaluation import evaluate_adapter
    from haori.evaluation.forgetting import Forgetting, forgetting_between
    from haori.evaluation.report import write_report
    from haori.evaluation.result import Confusion, EvaluationResult, RowResult
    from haori.evaluation.show import metrics_table, sample_panels, show_result
    from haori.evaluation.stored import evaluate_opened, evaluate_stored

__all__ = [
    "Confusion",
    "EvaluationResult",
    "Forgetting",
    "RowResult",
    "evaluate_adapter",
    "evaluate_opened",
    "evaluate_stored",
    "forgetting_between",
    "metrics_table",
    "sample_panels",
    "show_result",
    "write_report",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "evaluation": ("evaluate_adapter",),
        "forgetting": ("Forgetting", "forgetting_between"),
        "report": ("write_report",),
        "result": ("Confusion", "EvaluationResult", "RowResult"),
        "show": ("metrics_table", "sample_panels", "show_result"),
        "stored": ("evaluate_opened", "evaluate_stored"),
    },
)
