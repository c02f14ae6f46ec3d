"""Measure an adapter on data, against its base, with intervals; write the report.

Exports are lazy: importing the package loads neither torch nor numpy.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haori.evaluate.evaluation import MetricGroup, evaluate_adapter
    from haori.evaluate.forgetting import (
        Forgetting,
        GeneralText,
        TextLosses,
        forgetting_between,
        general_texts,
        own_texts,
        text_losses,
    )
    from haori.evaluate.labels import detect_labels
    from haori.evaluate.report import write_report
    from haori.evaluate.result import Answer, Confusion, EvaluationResult, RowResult, Sample
    from haori.evaluate.show import metrics_table, sample_panels, show_result
    from haori.evaluate.stored import evaluate_opened, evaluate_stored

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

_HOMES = {
    "Answer": "result",
    "Confusion": "result",
    "EvaluationResult": "result",
    "Forgetting": "forgetting",
    "GeneralText": "forgetting",
    "MetricGroup": "evaluation",
    "RowResult": "result",
    "Sample": "result",
    "TextLosses": "forgetting",
    "detect_labels": "labels",
    "evaluate_adapter": "evaluation",
    "evaluate_opened": "stored",
    "evaluate_stored": "stored",
    "forgetting_between": "forgetting",
    "general_texts": "forgetting",
    "metrics_table": "show",
    "own_texts": "forgetting",
    "sample_panels": "show",
    "show_result": "show",
    "text_losses": "forgetting",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


class _CallablePackage(ModuleType):
    """`haori.evaluate` names this package and a function of `haori.api`; calling the package calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `haori.api.evaluate`."""
        return import_module("haori.api").evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
