"""Evaluates an adapter of the library on a dataset: load, measure, write the report, note it on the card."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from haori.bases import load_model
from haori.core.errors import MismatchError
from haori.core.hashing import short
from haori.core.records import DataReference
from haori.core.settings import settings
from haori.core.storage import make_folder
from haori.data import Conversation, read_conversations
from haori.data.section import TextSection
from haori.data.seen import SeenRows
from haori.evaluation.evaluation import MetricGroup, evaluate_adapter
from haori.evaluation.report import write_report
from haori.evaluation.result import EvaluationResult
from haori.evaluation.systems import Systems
from haori.library import Library, OpenAdapter, StoredAdapter, open_adapter

__all__ = ["evaluate_opened", "evaluate_stored"]


def evaluate_stored(
    name: str,
    section: TextSection,
    *,
    against_base: bool = True,
    base_spec: str | None = None,
    labels: Sequence[str] | Literal["auto", "none"] = "auto",
    samples: int = 3,
    max_new_tokens: int = 64,
    out: Path | None = None,
) -> tuple[EvaluationResult, Path]:
    """Measure a stored adapter on a dataset.

    Args:
        name: Adapter in the library.
        section: The data.
        against_base: Measure the bare base beside it.
        base_spec: Base to use instead of the one on the card.
        labels: `auto`, `none`, or the labels of a label task.
        samples: Side-by-side answers in the report.
        max_new_tokens: Longest generated answer.
        out: Folder of the report; by default `evaluations/<name>-<data hash>` under HAORI_HOME.

    Returns:
        The result, and the folder that holds evaluation.json and evaluation.html.

    Raises:
        HaoriError: Adapter, base or data cannot be used.
    """
    conversations, report = read_conversations(section)
    opened = open_adapter(name, base_spec=base_spec)
    dropped = [f"Rows dropped: {report.dropped}."] if report.dropped else []
    return evaluate_opened(
        opened,
        conversations,
        report.reference(),
        notes=(*dropped, *report.notes),
        against_base=against_base,
        labels=labels,
        samples=samples,
        max_new_tokens=max_new_tokens,
        out=out,
    )


def evaluate_opened(
    opened: OpenAdapter,
    conversations: Sequence[Conversation],
    reference: DataReference,
    *,
    against_base: bool = True,
    labels: Sequence[str] | Literal["auto", "none"] = "auto",
    metrics: Sequence[MetricGroup] | None = None,
    samples: int = 3,
    max_new_tokens: int = 64,
    out: Path | None = None,
    notes: Sequence[str] = (),
) -> tuple[EvaluationResult, Path]:
    """Measure an adapter that is loaded already, with notes on its rows; otherwise as `evaluate_stored`."""
    asked = [row.with_system(opened.adapter.card.system) for row in conversations]
    if changed := sum(row is not given for row, given in zip(asked, conversations, strict=True)):
        notes = (f"Rows without a system message got the one trained with: {changed:,}.", *notes)
    conversations = asked
    name = opened.adapter.name
    folder = out or settings().home / "evaluations" / f"{name.replace('@', '-')}-{short(reference.hash)}"
    make_folder(folder)
    base_model = None
    if against_base:
        try:
            Systems(opened.model, against_base=True)
        except MismatchError:  # switching this adapter off does not give its base back
            base_model = load_model(opened.base)
    result = evaluate_adapter(
        opened.model,
        opened.tokenizer,
        conversations,
        data_reference=reference,
        against_base=against_base,
        labels=labels,
        metrics=metrics,
        samples=samples,
        max_new_tokens=max_new_tokens,
        adapter=name,
        base=opened.base.reference(),
        base_model=base_model,
        control_tokens=opened.prompts.control_tokens,
    )
    result = replace(result, notes=(*_seen(opened.adapter, conversations, reference), *notes, *result.notes))
    write_report(result, folder)
    Library().update(name, evaluations=(result.to_record(),))
    return result, folder


def _seen(adapter: StoredAdapter, rows: Sequence[Conversation], reference: DataReference) -> list[str]:
    """Say which of the rows the adapter was trained on, or that this cannot be told."""
    known = SeenRows.read(adapter.path)
    if known is not None:
        found = known.among(rows)
        if not found:
            return []
        return [
            f"The adapter was trained on {len(found):,} of these {len(rows):,} rows (the first: {found[0].origin}): "
            "the figures are too good for rows it never saw."
        ]
    if any(data.source == reference.source for data in adapter.card.data):
        return [
            f"The adapter was trained on {reference.source} itself: these figures say little about rows it never saw."
        ]
    return [
        "This adapter comes without hashes of its training rows, so whether these rows are among them is not known."
    ]
