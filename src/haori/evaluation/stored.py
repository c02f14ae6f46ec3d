"""Evaluates an adapter of the library on a dataset: load, measure, write the report, note it on the card."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from haori.bases import load_model, own_head
from haori.core.errors import MismatchError
from haori.core.hashing import short
from haori.core.records import AdapterCard, DataReference
from haori.core.settings import settings
from haori.core.storage import make_folder
from haori.data.section import DataSection
from haori.evaluation.evaluation import evaluate_adapter
from haori.evaluation.report import write_report
from haori.evaluation.result import EvaluationResult
from haori.evaluation.systems import Systems
from haori.library import Library, OpenAdapter, StoredAdapter, open_adapter
from haori.tasks.examination import USUAL, MeasureOptions
from haori.tasks.registry import task_of

__all__ = ["data_task", "evaluate_opened", "evaluate_stored"]


def evaluate_stored(
    name: str,
    section: DataSection,
    *,
    options: MeasureOptions = USUAL,
    against_base: bool = True,
    base_spec: str | None = None,
    samples: int = 3,
    out: Path | None = None,
) -> tuple[EvaluationResult, Path]:
    """Measure a stored adapter on a dataset.

    Args:
        name: Adapter in the library.
        section: The data, as a section of the adapter's task.
        options: What to measure.
        against_base: Measure the bare base beside it.
        base_spec: Base to use instead of the one on the card.
        samples: Side-by-side answers in the report.
        out: Folder of the report; by default `evaluations/<name>-<data hash>` under HAORI_HOME.

    Returns:
        The result, and the folder that holds evaluation.json and evaluation.html.

    Raises:
        HaoriError: Adapter, base or data cannot be used.
    """
    task = task_of(Library().get(name).card.task)
    rows, reference, notes = task.read(section)
    opened = open_adapter(name, base_spec=base_spec)
    return evaluate_opened(
        opened, rows, reference, options=options, notes=notes, against_base=against_base, samples=samples, out=out
    )


def data_task(card: AdapterCard) -> str:
    """Return the task whose data an adapter is measured on; a file of a mounted tree says `image`, and no more."""
    return "text_to_image" if card.task == "image" else card.task


def evaluate_opened(
    opened: OpenAdapter,
    rows: Sequence[Any],
    reference: DataReference,
    *,
    options: MeasureOptions = USUAL,
    against_base: bool = True,
    samples: int = 3,
    out: Path | None = None,
    notes: Sequence[str] = (),
) -> tuple[EvaluationResult, Path]:
    """Measure an adapter that is loaded already, with notes on its rows; otherwise as `evaluate_stored`."""
    task = task_of(opened.adapter.card.task)
    rows, changed = task.as_trained(rows, opened.adapter.card)
    name = opened.adapter.name
    folder = out or settings().home / "evaluations" / f"{name.replace('@', '-')}-{short(reference.hash)}"
    make_folder(folder)
    base_model = None
    head = opened.adapter.card.head
    if against_base and head is not None and own_head(opened.base) != head:
        against_base = False
        notes = (
            *notes,
            f"The base {opened.base.name} has no head for these labels, so there is nothing to compare with; "
            "`haori compare --methods lora,full,head` shows what the adapter adds to a head alone.",
        )
    if against_base:
        try:
            Systems(opened.model, against_base=True)
        except MismatchError:  # switching this adapter off does not give its base back
            base_model = load_model(opened.base, head=opened.adapter.card.head)
    result = evaluate_adapter(
        task,
        opened.model,
        opened.tokenizer,
        rows,
        data_reference=reference,
        options=replace(options, control_tokens=opened.prompts.control_tokens),
        against_base=against_base,
        samples=samples,
        adapter=name,
        base=opened.base.reference(),
        base_model=base_model,
    )
    seen = _seen(opened.adapter, task.seen(opened.adapter.path, rows), len(rows), reference)
    result = replace(result, notes=(*seen, *changed, *notes, *result.notes))
    write_report(result, folder)
    Library().update(name, evaluations=(result.to_record(),))
    return result, folder


def _seen(adapter: StoredAdapter, found: list[str] | None, rows: int, reference: DataReference) -> list[str]:
    """Say which of the rows the adapter was trained on, or that this cannot be told."""
    if found is not None:
        if not found:
            return []
        return [
            f"The adapter was trained on {len(found):,} of these {rows:,} rows (the first: {found[0]}): "
            "the figures are too good for rows it never saw."
        ]
    if any(data.source == reference.source for data in adapter.card.data):
        return [
            f"The adapter was trained on {reference.source} itself: these figures say little about rows it never saw."
        ]
    return [
        "This adapter comes without hashes of its training rows, so whether these rows are among them is not known."
    ]
