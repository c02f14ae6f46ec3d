"""The names of labels: those given, those a dataset brings for its numbers, or those that stand in the rows."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from haori.core.errors import DataError, nearest
from haori.data.sources import Source
from haori.tasks.classification.labelled_row import LabelledRow
from haori.tasks.classification.recipe import ClassificationData

__all__ = ["LabelNames", "check_labels", "order_labels"]

_MOST_LABELS = 1000


@dataclass(frozen=True)
class LabelNames:
    """What the labels of a file's rows are called.

    Attributes:
        given: The names that a recipe lists; a row may have no others.
        numbered: The names that numbers stand for.
    """

    given: tuple[str, ...] | None
    numbered: tuple[str, ...] | None

    @classmethod
    def of(cls, section: ClassificationData, source: Source, file: str, columns: Collection[str]) -> Self:
        """Look at the recipe, and at what the dataset says of its columns."""
        given = None if section.labels == "auto" else section.labels
        return cls(given, given or _names_in_dataset(source, file, columns))

    def named(self, row: LabelledRow) -> LabelledRow:
        """Return the row with the names of its labels.

        Raises:
            DataError: A label is none of those given.
        """
        labels = tuple(self._name(label, row.origin) for label in row.labels)
        return row if labels == row.labels else replace(row, labels=labels)

    def _name(self, label: str, origin: str) -> str:
        if self.numbered is None or label in self.numbered:
            return label
        if label.isdecimal() and int(label) < len(self.numbered):
            return self.numbered[int(label)]
        if self.given is None:
            return label
        hint = nearest(label, self.given) or f"it has {', '.join(self.given[:20])}."
        raise DataError(f"{origin}: data.labels does not have the label {label!r}; {hint}")


def order_labels(found: Collection[str]) -> tuple[str, ...]:
    """Return labels in the order of a head's outputs: numbers by size, `O` before other tags, names by alphabet."""
    if all(label.lstrip("-").isdecimal() for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found, key=lambda label: (label != "O", label.partition("-")[2] or label, label)))


def check_labels(
    labels: Sequence[str], train: Mapping[str, int], validation: Mapping[str, int], rows: int, problem: str
) -> list[str]:
    """Refuse labels that cannot be learnt, and say what a user should know of the others.

    Args:
        labels: All labels.
        train: Training rows of each label, or words.
        validation: The same of the rows held out.
        rows: Training rows.
        problem: `single_label`, `multi_label` or `token`.

    Raises:
        DataError: There is nothing to choose between, nearly every row has a label of its own, or validation has a
            label that training lacks.
    """
    least = 1 if problem == "multi_label" else 2
    if len(labels) < least:
        only = f"every row has the label {labels[0]!r}" if labels else "no row has a label"
        raise DataError(f"There is nothing to tell apart: {only}; a classifier needs at least {least + (least == 1)}.")
    if problem != "token" and len(labels) > 20 and 2 * len(labels) > rows:
        raise DataError(
            f"The {rows:,} training rows have {len(labels):,} different labels, such as {labels[0]!r}: this looks like "
            "text. Name the column of labels with --set data.columns.text=... --set data.columns.label=..."
        )
    if len(labels) > _MOST_LABELS:
        raise DataError(f"There are {len(labels):,} labels; at most {_MOST_LABELS:,} can be told apart here.")
    known = set(labels)
    lost = [(label, count) for label, count in validation.items() if label not in known]
    if lost:
        named = ", ".join(f"{label!r} ({count:,})" for label, count in lost[:10])
        raise DataError(
            f"Validation has labels that no training row has: {named}; the classifier could never answer them. Add "
            "rows to train on, or take these out of validation."
        )
    what = "word" if problem == "token" else "row"
    notes = (
        [f"Labels in no training row: {_listed(none)}."] if (none := [n for n in labels if not train.get(n)]) else []
    )
    if once := [label for label in labels if train.get(label) == 1]:
        notes.append(f"Labels with a single training {what}: {_listed(once)}.")
    return notes


def _names_in_dataset(source: Source, file: str, columns: Collection[str]) -> tuple[str, ...] | None:
    """Return the names of a `ClassLabel` column of a hub dataset, or of a file that `datasets` wrote."""
    if source.hub is not None:
        return _class_names({name: _plain(feature) for name, feature in source.features().items()}, columns)
    path = next((path for path, name in source.files if name == file), None)
    return None if path is None else _class_names(_features_in_file(path), columns)


def _features_in_file(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            metadata = pq.read_schema(path).metadata
        elif path.suffix.lower() == ".arrow":
            with pa.OSFile(str(path)) as stream:
                metadata = pa.ipc.open_stream(stream).schema.metadata
        else:
            return {}
        found = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return {}
    return found if isinstance(found, dict) else {}


def _class_names(features: Mapping[str, Any], columns: Collection[str]) -> tuple[str, ...] | None:
    for column in sorted(columns):
        feature = features.get(column)
        while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        if (
            isinstance(feature, dict)
            and feature.get("_type") == "ClassLabel"
            and isinstance(feature.get("names"), list)
        ):
            return tuple(map(str, feature["names"]))
    return None


def _plain(feature: Any) -> Any:
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return {"feature": _plain(inner)}
    return {"_type": type(feature).__name__, "names": getattr(feature, "names", None)}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
