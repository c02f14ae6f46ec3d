"""Measure an adapter on data, against its base, with intervals; write the report.

Exports are lazy: importing the package loads neither torch nor numpy.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.evaluation.evaluation import MetricGroup, evaluate_adapter
    from haori.evaluation.forgetting import (
        Forgetting,
        GeneralText,
        TextLosses,
        forgetting_between,
        general_texts,
        own_texts,
        text_losses,
    )
    from haori.evaluation.labels import detect_labels
    from haori.evaluation.report import write_report
    from haori.evaluation.result import Answer, Confusion, EvaluationResult, RowResult, Sample
    from haori.evaluation.show import metrics_table, sample_panels, show_result
    from haori.evaluation.stored import evaluate_opened, evaluate_stored

__all__ = [
    "Answer",
    "Confusion",
    "EvaluationResult",
    "Forgetting",
    "GeneralText",
    "MetricGroup",
    "RowResult",
    "Sample",
    "TextLosses",
    "detect_labels",
    "evaluate_adapter",
    "evaluate_opened",
    "evaluate_stored",
    "forgetting_between",
    "general_texts",
    "metrics_table",
    "own_texts",
    "sample_panels",
    "show_result",
    "text_losses",
    "write_report",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "evaluation": ("MetricGroup", "evaluate_adapter"),
        "forgetting": (
            "Forgetting",
            "GeneralText",
            "TextLosses",
            "forgetting_between",
            "general_texts",
            "own_texts",
            "text_losses",
        ),
        "labels": ("detect_labels",),
        "report": ("write_report",),
        "result": ("Answer", "Confusion", "EvaluationResult", "RowResult", "Sample"),
        "show": ("metrics_table", "sample_panels", "show_result"),
        "stored": ("evaluate_opened", "evaluate_stored"),
    },
)
