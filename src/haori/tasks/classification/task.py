"""Classification as a task; see `haori.tasks.task.Task` for what each part is for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError, RecipeError, nearest
from haori.core.methods import AdaptedMethod, HeadMethod, Method
from haori.core.records import Head
from haori.tasks.classification.recipe import ClassificationData, ClassificationRecipe
from haori.tasks.examination import AnsweredRow, MeasureOptions
from haori.tasks.task import Choice, Task
from haori.tasks.token_budgets import Lengths, choose_budgets

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import RenderableType
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from haori.bases import Base
    from haori.core.records import AdapterCard, DataReference
    from haori.data.report import Leaks
    from haori.library.proof.logits import Probe
    from haori.metrics.statistics import Statistic
    from haori.tasks.classification.encoding import TextEncoder
    from haori.tasks.classification.examination import ClassificationExamination
    from haori.tasks.classification.labelled_row import LabelledRow
    from haori.tasks.classification.objective import ClassificationObjective
    from haori.tasks.classification.rows import ClassificationSplit

__all__ = ["TASK", "Classification"]

_PROBES = 4
_DROPOUT = 0.1


class Classification(Task):
    """Labels for texts, pairs of texts, or words, by encoders and decoders with a head."""

    kind = "classification"
    title = "classification"
    unit = "tokens"
    counted = "rows"

    def peft_type(self, recipe: ClassificationRecipe) -> str:
        """Return PEFT's type of a model that labels texts, or tokens."""
        return "TOKEN_CLS" if recipe.data.problem == "token" else "SEQ_CLS"

    def check(self, recipe: ClassificationRecipe, base: "Base") -> None:
        """Refuse keys that do not go together, and a base that cannot carry a head."""
        from haori.bases.heads import head_class

        data, weights = recipe.data, recipe.loss.class_weights
        if data.problem == "token" and data.label_separator is not None:
            raise RecipeError(
                "'data.label_separator' parts the labels of a text; with data.problem=token leave it out."
            )
        if data.labels != "auto" and len(set(data.labels)) < len(data.labels):
            raise RecipeError(f"'data.labels' names a label twice: {', '.join(data.labels)}.")
        if isinstance(weights, dict) and data.labels != "auto":
            _check_weights(weights, data.labels)
        head_class(base, self.head(recipe))

    def head(self, recipe: ClassificationRecipe) -> Head:
        """Return the head with the labels of the recipe; any two before they are known."""
        data = recipe.data
        labels = ("0", "1") if data.labels == "auto" else data.labels
        kind: Any = "token_classification" if data.problem == "token" else "sequence_classification"
        return Head(kind=kind, labels=labels, multi_label=data.problem == "multi_label")

    def rows(
        self,
        recipe: ClassificationRecipe,
        base: "Base",
        processor: "PreTrainedTokenizerBase",
        *,
        tolerant: bool = False,
    ) -> "ClassificationSplit":
        """Read, encode and split the data."""
        from haori.bases import embeddings_of
        from haori.tasks.classification.rows import load_rows

        encoder = self._encoder(recipe, base, processor)
        return load_rows(recipe.data, encoder, embeddings=embeddings_of(base), tolerant=tolerant)

    def _encoder(
        self, recipe: ClassificationRecipe, base: "Base", processor: "PreTrainedTokenizerBase"
    ) -> "TextEncoder":
        from haori.bases import load_skeleton
        from haori.tasks.classification.encoding import TextEncoder, default_length, longest_input

        longest = longest_input(load_skeleton(base), processor, base.context_length)
        wanted = recipe.data.max_length
        if wanted == "auto":
            wanted = default_length(longest)
        if wanted > longest:
            raise DataError(
                f"data.max_length is {wanted}, but this base reads at most {longest} tokens; give a smaller one, or "
                "leave it at auto."
            )
        return TextEncoder(processor, wanted)

    def show(self, rows: "Dataset", processor: "PreTrainedTokenizerBase", count: int) -> "list[RenderableType]":
        """Return rows as the model reads them, with their labels."""
        from haori.tasks.classification.show import sample_panels

        return sample_panels(processor, rows, count)

    def resolve(
        self, recipe: ClassificationRecipe, split: "ClassificationSplit", base: "Base", device: str
    ) -> tuple[ClassificationRecipe, tuple[Choice, ...]]:
        """Write down problem, labels, weights and the longest row, choose budgets, and train the head in full."""
        lengths = Lengths.of(list(split.train["length"]), list(split.validation["length"]))
        training, choices = choose_budgets(recipe.training, lengths, device)
        data, found = recipe.data, list(choices)
        changes: dict[str, Any] = {}
        if data.problem == "auto":
            changes["problem"] = split.problem
            found.append(Choice("data.problem", split.problem, "what the columns and their labels show"))
        if data.labels == "auto":
            changes["labels"] = split.labels
            shown = ", ".join(split.labels[:10]) + (", ..." if len(split.labels) > 10 else "")
            found.append(Choice("data.labels", shown, f"the {len(split.labels)} labels of the training rows"))
        if data.max_length == "auto":
            changes["max_length"] = split.report.max_length
            found.append(Choice("data.max_length", split.report.max_length, "what the base reads, at most 512"))
        resolved = recipe.model_copy(update={"training": training, "data": data.model_copy(update=changes)})
        weights, of_weights = _weights(resolved, split)
        method, of_method = _with_dropout(resolved)
        method, of_head = _with_head(resolved.model_copy(update={"method": method}), self.head(resolved), base)
        update = {"method": method, "loss": recipe.loss.model_copy(update={"class_weights": weights})}
        return resolved.model_copy(update=update), (*found, *of_weights, *of_method, *of_head)

    def objective(
        self, rows: "Dataset", processor: "PreTrainedTokenizerBase", recipe: ClassificationRecipe
    ) -> "ClassificationObjective":
        """Return batches and losses of a part of the split."""
        from haori.tasks.classification.objective import ClassificationObjective

        pad: Any = processor.pad_token_id
        weights = recipe.loss.class_weights
        given = weights if isinstance(weights, dict) else None
        return ClassificationObjective(rows, self.head(recipe), pad, given)

    def probes(
        self, processor: "PreTrainedTokenizerBase", recipe: ClassificationRecipe, split: "ClassificationSplit"
    ) -> "list[Probe]":
        """Return a few training rows."""
        from haori.tasks.classification.objective import collate

        pad: Any = processor.pad_token_id
        few = split.train.select(range(min(_PROBES, len(split.train))))
        return [collate([row["input_ids"]], [row["token_type_ids"]], pad) for row in few]

    def rendering(
        self, processor: "PreTrainedTokenizerBase", recipe: ClassificationRecipe, split: "ClassificationSplit"
    ) -> tuple[list[int], list[int]] | None:
        """Return a row as it is trained on, and as `haori classify` encodes it."""
        from haori.tasks.classification.encoding import TextEncoder
        from haori.tasks.classification.labelled_row import LabelledRow

        row = split.train[0]
        text = LabelledRow.from_json(row["row"], row["origin"])
        assert recipe.data.max_length != "auto"
        encoded = TextEncoder(processor, recipe.data.max_length).encode(text.text, text.pair, text.words)
        return list(row["input_ids"]), encoded.input_ids

    def write_files(
        self,
        folder: Path,
        processor: "PreTrainedTokenizerBase",
        recipe: ClassificationRecipe,
        split: "ClassificationSplit",
    ) -> None:
        """Write the names of the labels, and hashes of the training rows."""
        from haori.data.seen import SeenRows
        from haori.library.head_files import write_head
        from haori.tasks.classification.labelled_row import LabelledRow

        write_head(folder, self.head(recipe))
        rows = split.train.select_columns(["row", "origin"])
        SeenRows.of(LabelledRow.from_json(row["row"], row["origin"]).as_text() for row in rows).write(folder)

    def next_command(self, adapter: str) -> str:
        """Return the command that labels texts."""
        return f"haori classify {adapter} --text ..."

    def card(self, processor: "PreTrainedTokenizerBase", recipe: ClassificationRecipe) -> dict[str, Any]:
        """Return the head."""
        return {"head": self.head(recipe)}

    def read(self, section: ClassificationData) -> "tuple[list[LabelledRow], DataReference, tuple[str, ...]]":
        """Read labelled rows; their labels are named by the classifier that is measured."""
        from haori.tasks.classification.reading import read_rows

        return read_rows(section)

    def held_out(self, split: "ClassificationSplit") -> "list[LabelledRow]":
        """Return the rows held out."""
        return _rows_of(split.validation)

    def as_trained(
        self, rows: "Sequence[LabelledRow]", card: "AdapterCard"
    ) -> "tuple[Sequence[LabelledRow], tuple[str, ...]]":
        """Return rows that are cut as those of the training were."""
        from haori.tasks.classification.examination import MeasuredRows

        found = MeasuredRows(rows)
        data: Any = (card.recipe_data or {}).get("data")
        length = data.get("max_length") if isinstance(data, dict) else None
        found.max_length = length if isinstance(length, int) else None
        return found, ()

    def seen(self, folder: Path, rows: "Sequence[LabelledRow]") -> list[str] | None:
        """Look for rows among the hashes kept beside the adapter."""
        from haori.data.seen import SeenRows

        known = SeenRows.read(folder)
        return None if known is None else [row.origin for row in known.among([row.as_text() for row in rows])]

    def leaks(self, rows: "Sequence[LabelledRow]", split: "ClassificationSplit") -> "Leaks":
        """Compare the texts of rows with those of the training rows, whatever their labels."""
        from haori.data.leaks import find_leaks

        return find_leaks((row.as_text() for row in rows), (row.as_text() for row in _rows_of(split.train)))

    def examine(
        self,
        model: "nn.Module",
        processor: "PreTrainedTokenizerBase",
        rows: "Sequence[LabelledRow]",
        options: MeasureOptions,
    ) -> "ClassificationExamination":
        """Encode rows as in training."""
        from haori.tasks.classification.examination import ClassificationExamination

        return ClassificationExamination(model, processor, rows, options)

    def statistics(self, rows: "Sequence[AnsweredRow]", labels: Sequence[str]) -> "dict[str, Statistic]":
        """Return the metrics of a classifier's answers."""
        from haori.tasks.classification.examination import statistics_of

        return statistics_of(rows, labels)


def _rows_of(rows: "Dataset") -> "list[LabelledRow]":
    from haori.tasks.classification.labelled_row import LabelledRow

    return [LabelledRow.from_json(row["row"], row["origin"]) for row in rows.select_columns(["row", "origin"])]


def _weights(
    recipe: ClassificationRecipe, split: "ClassificationSplit"
) -> tuple["str | dict[str, float]", tuple[Choice, ...]]:
    """Return the weight of each label: as given, or by the training rows."""
    given, counts = recipe.loss.class_weights, split.report.labels["train"]
    if isinstance(given, dict):
        _check_weights(given, split.labels)
    if given != "balanced":
        return given, ()
    if recipe.data.problem == "multi_label":
        rows = len(split.train)
        found = {label: (rows - count) / count for label, count in counts.items() if 0 < count < rows}
        reason = "rows without the label for each row with it"
    else:
        present = {label: count for label, count in counts.items() if count}
        total = sum(present.values())
        found = {label: total / (len(present) * count) for label, count in present.items()}
        reason = "all labels weigh alike together: rows / (labels x rows of the label)"
    found = {label: float(f"{weight:.4g}") for label, weight in found.items()}
    shown = ", ".join(f"{label} {weight:g}" for label, weight in list(found.items())[:10])
    return found, (Choice("loss.class_weights", shown, reason),)


def _check_weights(weights: Mapping[str, float], labels: tuple[str, ...]) -> None:
    for label in weights:
        if label not in labels:
            hint = nearest(label, labels) or f"they are {', '.join(labels[:20])}."
            raise RecipeError(f"'loss.class_weights' has {label!r}, which is none of the labels; {hint}")


def _with_dropout(recipe: ClassificationRecipe) -> tuple[Method, tuple[Choice, ...]]:
    """Choose dropout where the recipe leaves it; an adapter gone on from keeps its own."""
    method = recipe.method
    if getattr(method, "dropout", None) != "auto" or recipe.from_ is not None:
        return method, ()
    reason = "labels are few bits to learn from, and the adapter would memorise the rows"
    return method.model_copy(update={"dropout": _DROPOUT}), (Choice("method.dropout", _DROPOUT, reason),)


def _with_head(recipe: ClassificationRecipe, head: Head, base: "Base") -> tuple[Method, tuple[Choice, ...]]:
    """Add the modules of the head to those that are trained in full and saved; an adapter gone on from has its own."""
    from haori.bases import head_modules, load_skeleton

    method = recipe.method
    if not isinstance(method, AdaptedMethod | HeadMethod) or recipe.from_ is not None:
        return method, ()
    modules = head_modules(load_skeleton(base, head=head))
    wanted = (*method.modules_to_save, *(name for name in modules if name not in method.modules_to_save))
    if wanted == method.modules_to_save:
        return method, ()
    reason = "the head has nothing to start from, so it is trained in full beside the adapter, and kept with it"
    if isinstance(method, HeadMethod):
        reason = "the head, which is all that is trained"
    return method.model_copy(update={"modules_to_save": wanted}), (
        Choice("method.modules_to_save", ", ".join(wanted), reason),
    )


TASK = Classification()
