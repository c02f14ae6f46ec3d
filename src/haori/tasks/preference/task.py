"""Preference learning as a task; see `haori.tasks.task.Task` for what each part is for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import BaseError
from haori.tasks.causal_lm.task import WRITES_TEXT
from haori.tasks.preference.pairs import Judged, Pair
from haori.tasks.preference.recipe import KtoLoss, PreferenceData, PreferenceRecipe
from haori.tasks.task import Choice, Task
from haori.tasks.token_budgets import Lengths, choose_budgets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from datasets import Dataset
    from rich.console import RenderableType
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from haori.bases import Base
    from haori.core.records import AdapterCard, DataReference
    from haori.data.report import Leaks
    from haori.library.proof.logits import Probe
    from haori.metrics.statistics import Statistic
    from haori.tasks.examination import AnsweredRow, MeasureOptions, TextLosses
    from haori.tasks.preference.examination import PreferenceExamination
    from haori.tasks.preference.objective import PreferenceObjective
    from haori.tasks.preference.reading import Preferred
    from haori.tasks.preference.rows import PreferenceRows

__all__ = ["TASK", "Preference"]


class Preference(Task):
    """Which of two answers people prefer, learnt by models that write text."""

    kind = "preference"
    title = "preference learning"
    unit = "tokens"
    counted = "rows"

    def peft_type(self, recipe: PreferenceRecipe) -> str:
        """Return PEFT's type of a model that writes text."""
        return WRITES_TEXT

    def check(self, recipe: PreferenceRecipe, base: "Base") -> None:
        """Refuse a base that does not generate text."""
        from haori.bases import continues_text

        if not continues_text(base):
            raise BaseError(
                f"The base {base.name!r} is a {base.fingerprint.architecture}; the task preference needs a model that "
                "generates text, such as smollm2-135m-instruct."
            )

    def rows(
        self,
        recipe: PreferenceRecipe,
        base: "Base",
        processor: "PreTrainedTokenizerBase",
        *,
        tolerant: bool = False,
    ) -> "PreferenceRows":
        """Render, tokenise and split the data."""
        from haori.bases import embeddings_of
        from haori.tasks.preference.reading import OnlyJudgedError
        from haori.tasks.preference.rows import load_preferences

        def load(*, one_by_one: bool) -> "PreferenceRows":
            return load_preferences(
                recipe.data,
                processor,
                one_by_one=one_by_one,
                context_length=base.context_length,
                embeddings=embeddings_of(base),
                tolerant=tolerant,
            )

        try:
            return load(one_by_one=isinstance(recipe.loss, KtoLoss))
        except OnlyJudgedError:
            if not tolerant:
                raise
            return load(one_by_one=True)  # a check of data knows of no loss

    def show(self, rows: "Dataset", processor: "PreTrainedTokenizerBase", count: int) -> "list[RenderableType]":
        """Return answers with their prompts as text, with scored tokens marked."""
        from haori.data import sample_panels

        return sample_panels(processor, _sides(rows.select(range(min(count, len(rows))))), 2 * count)

    def resolve(
        self, recipe: PreferenceRecipe, split: "PreferenceRows", base: "Base", device: str
    ) -> tuple[PreferenceRecipe, tuple[Choice, ...]]:
        """Choose the budgets of batches, and write down the longest row."""
        from haori.data.tokenise import resolve_max_length

        data, longest = recipe.data, resolve_max_length(recipe.data.max_length, base.context_length)
        choices: tuple[Choice, ...] = ()
        if data.max_length == "auto":
            choices = (Choice("data.max_length", longest, "the base's context, at most 2,048"),)
            data = data.model_copy(update={"max_length": longest})
        recipe = recipe.model_copy(update={"data": data})
        costs = [self._objective(part, 0, recipe).costs for part in (split.train, split.validation) if len(part)]
        training, budgets = choose_budgets(recipe.training, Lengths.of(costs[0], costs[-1]), device)
        return recipe.model_copy(update={"training": training}), (*budgets, *choices)

    def objective(
        self, rows: "Dataset", processor: "PreTrainedTokenizerBase", recipe: PreferenceRecipe
    ) -> "PreferenceObjective":
        """Return batches and losses of a part of the split."""
        from haori.tasks.preference.reference import reference_of

        pad: Any = processor.pad_token_id
        found = self._objective(rows, pad, recipe)
        found.reference = reference_of(recipe)
        return found

    def probes(
        self, processor: "PreTrainedTokenizerBase", recipe: PreferenceRecipe, split: "PreferenceRows"
    ) -> "list[Probe]":
        """Return a few prompts."""
        from haori.library import default_probes

        return [*default_probes(processor)]

    def rendering(
        self, processor: "PreTrainedTokenizerBase", recipe: PreferenceRecipe, split: "PreferenceRows"
    ) -> tuple[list[int], list[int]]:
        """Return the prompt of a training row as trained on, and as inference renders it."""
        from haori.data import render_row_prompt

        row = split.train[0]
        found = _preference(row)
        first = next(
            place
            for place, message in enumerate(found.conversations[0].messages)
            if message["role"] == "assistant" and message.get("loss") is not False
        )
        prompt = render_row_prompt(processor, found.conversations[0], first, recipe.data.control_tokens)
        return list(row["input_ids"][: len(prompt)]), prompt

    def write_files(
        self, folder: Path, processor: "PreTrainedTokenizerBase", recipe: PreferenceRecipe, split: "PreferenceRows"
    ) -> None:
        """Write the chat template, and hashes of the training rows."""
        from haori.data import template_of
        from haori.data.seen import SeenRows

        (folder / "chat_template.jinja").write_text(template_of(processor), encoding="utf-8")
        rows = split.train.select_columns(["preference", "desirable", "origin"])
        SeenRows.of(side for row in rows for side in _preference(row).conversations).write(folder)

    def card(self, processor: "PreTrainedTokenizerBase", recipe: PreferenceRecipe) -> dict[str, Any]:
        """Return the hash of the chat template."""
        from haori.data import template_hash

        return {"template_hash": template_hash(processor)}

    def read(self, section: PreferenceData) -> "tuple[list[Preferred], DataReference, tuple[str, ...]]":
        """Read pairs, or judged answers where there are no pairs."""
        from haori.tasks.preference.measuring import read_preferences

        return read_preferences(section)

    def held_out(self, split: "PreferenceRows") -> "list[Preferred]":
        """Return what was held out."""
        return [_preference(row) for row in split.validation.select_columns(["preference", "desirable", "origin"])]

    def as_trained(
        self, rows: "Sequence[Preferred]", card: "AdapterCard"
    ) -> "tuple[Sequence[Preferred], tuple[str, ...]]":
        """Give rows without a system message the one trained with."""
        asked = [row.with_system(card.system) for row in rows]
        changed = sum(row is not given for row, given in zip(asked, rows, strict=True))
        notes = (f"Rows without a system message got the one trained with: {changed:,}.",) if changed else ()
        return asked, notes

    def seen(self, folder: Path, rows: "Sequence[Preferred]") -> list[str] | None:
        """Look for answers among the hashes kept beside the adapter."""
        from haori.data.seen import SeenRows

        known = SeenRows.read(folder)
        if known is None:
            return None
        sides = [side for row in rows for side in row.conversations]
        return list(dict.fromkeys(side.origin for side in known.among(sides)))

    def leaks(self, rows: "Sequence[Preferred]", split: "PreferenceRows") -> "Leaks":
        """Compare prompts with those of the training rows."""
        from haori.data.leaks import find_leaks

        trained = split.train.select_columns(["preference", "desirable", "origin"])
        return find_leaks((row.prompt for row in rows), (_preference(row).prompt for row in trained))

    def options(self, section: PreferenceData) -> "MeasureOptions":
        """Return how control tokens in messages are read."""
        from haori.tasks.examination import MeasureOptions

        return MeasureOptions(control_tokens=section.control_tokens)

    def examine(
        self,
        model: "nn.Module",
        processor: "PreTrainedTokenizerBase",
        rows: "Sequence[Preferred]",
        options: "MeasureOptions",
    ) -> "PreferenceExamination":
        """Render and tokenise both answers."""
        from haori.tasks.preference.examination import PreferenceExamination

        return PreferenceExamination(model, processor, rows, options)

    def general_losses(
        self, model: "nn.Module", processor: "PreTrainedTokenizerBase", own: str | None
    ) -> "dict[str, TextLosses]":
        """Score general text as for text generation: the model is one that writes text."""
        from haori.tasks.causal_lm import TASK as TEXT

        return TEXT.general_losses(model, processor, own)

    def check_general(self, own: str | None) -> None:
        """Read the user's text once."""
        from haori.tasks.causal_lm import TASK as TEXT

        TEXT.check_general(own)

    def statistics(self, rows: "Sequence[AnsweredRow]", labels: "Sequence[str]") -> "dict[str, Statistic]":
        """Return accuracy, margin and rewards of pairs; of judged answers how they rank."""
        from haori.tasks.preference.examination import statistics_of

        return statistics_of(rows)

    def _objective(self, rows: "Dataset", pad: int, recipe: PreferenceRecipe) -> "PreferenceObjective":
        from haori.tasks.preference.objective import PreferenceObjective

        assert recipe.data.max_length != "auto"
        return PreferenceObjective(rows, pad, recipe.loss, recipe.data.max_length, None)


def _preference(row: "Mapping[str, Any]") -> Pair | Judged:
    kind: type[Pair | Judged] = Pair if row["desirable"] is None else Judged
    return kind.from_json(row["preference"], row["origin"])


def _sides(rows: "Iterable[Mapping[str, Any]]") -> "Iterator[dict[str, Any]]":
    """Yield the answers of rows one by one, with what is said of them in their origin."""
    for row in rows:
        words = {None: "chosen", True: "good", False: "bad"}[row["desirable"]]
        yield {"input_ids": row["input_ids"], "labels": row["labels"], "origin": f"{row['origin']} ({words})"}
        if row["rejected_input_ids"] is not None:
            ids, labels = row["rejected_input_ids"], row["rejected_labels"]
            yield {"input_ids": ids, "labels": labels, "origin": f"{row['origin']} (rejected)"}


TASK = Preference()
