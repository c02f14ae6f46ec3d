"""Text generation as a task; see `haori.tasks.task.Task` for what each part is for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import BaseError
from haori.data.section import TextSection
from haori.tasks.causal_lm.recipe import CausalLmRecipe
from haori.tasks.examination import MeasureOptions
from haori.tasks.task import Choice, Task
from haori.tasks.token_budgets import Lengths, choose_budgets

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import RenderableType
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from haori.bases import Base
    from haori.core.records import AdapterCard, DataReference
    from haori.data import Conversation, TextData
    from haori.data.report import Leaks
    from haori.library.proof.logits import Probe
    from haori.metrics.statistics import Statistic
    from haori.tasks.causal_lm.examination import TextExamination
    from haori.tasks.causal_lm.objective import CausalLmObjective
    from haori.tasks.examination import AnsweredRow, TextLosses

__all__ = ["TASK", "WRITES_TEXT", "CausalLm"]

WRITES_TEXT = "CAUSAL_LM"
"""PEFT's type of a model that writes text."""

_LONGEST = 2048
_LOOKED_AT = 50  # rows searched for one with an answer


class CausalLm(Task):
    """Text generation by GPT-like models."""

    kind = "causal_lm"
    title = "text generation"
    unit = "tokens"
    counted = "trained_tokens"
    loss_unit = "nats per trained token"

    def peft_type(self, recipe: CausalLmRecipe) -> str:
        """Return PEFT's type of a model that writes text."""
        return WRITES_TEXT

    def check(self, recipe: CausalLmRecipe, base: "Base") -> None:
        """Refuse a base that does not generate text."""
        from haori.bases import continues_text

        if not continues_text(base):
            raise BaseError(
                f"The base {base.name!r} is a {base.fingerprint.architecture}; the task causal_lm needs a model that "
                "generates text, such as smollm2-135m-instruct."
            )

    def rows(
        self, recipe: CausalLmRecipe, base: "Base", processor: "PreTrainedTokenizerBase", *, tolerant: bool = False
    ) -> "TextData":
        """Render, tokenise and split the data."""
        from haori.bases import embeddings_of
        from haori.data import check_text, load_text

        load = check_text if tolerant else load_text
        return load(recipe.data, processor, context_length=base.context_length, embeddings=embeddings_of(base))

    def show(self, rows: "Dataset", processor: "PreTrainedTokenizerBase", count: int) -> "list[RenderableType]":
        """Return rows as text, with trained tokens marked."""
        from haori.data import sample_panels

        return sample_panels(processor, rows, count)

    def resolve(
        self, recipe: CausalLmRecipe, split: "TextData", base: "Base", device: str
    ) -> tuple[CausalLmRecipe, tuple[Choice, ...]]:
        """Choose the budgets of batches, and write down the longest row."""
        lengths = Lengths.of(list(split.train["length"]), list(split.validation["length"]))
        training, choices = choose_budgets(recipe.training, lengths, device)
        data = recipe.data
        if data.max_length == "auto":
            longest = min(_LONGEST, base.context_length)
            choices = (*choices, Choice("data.max_length", longest, f"the base's context, at most {_LONGEST:,}"))
            data = data.model_copy(update={"max_length": longest})
        return recipe.model_copy(update={"training": training, "data": data}), choices

    def objective(
        self, rows: "Dataset", processor: "PreTrainedTokenizerBase", recipe: CausalLmRecipe
    ) -> "CausalLmObjective":
        """Return batches and losses of a part of the split."""
        from haori.tasks.causal_lm.objective import CausalLmObjective

        pad: Any = processor.pad_token_id
        return CausalLmObjective(rows, pad)

    def probes(self, processor: "PreTrainedTokenizerBase", recipe: CausalLmRecipe, split: "TextData") -> "list[Probe]":
        """Return a few prompts."""
        from haori.library import default_probes

        return [*default_probes(processor)]

    def rendering(
        self, processor: "PreTrainedTokenizerBase", recipe: CausalLmRecipe, split: "TextData"
    ) -> tuple[list[int], list[int]] | None:
        """Return the prompt of a training row as trained on, and as inference renders it; None for plain text."""
        from haori.data import Conversation, render_row_prompt

        for row in split.train.select(range(min(_LOOKED_AT, len(split.train)))):
            found = Conversation.from_json(row["conversation"], row["origin"])
            answers = [i for i, message in enumerate(found.messages) if message["role"] == "assistant"]
            if answers and any(label != -100 for label in row["labels"]):
                prompt = render_row_prompt(processor, found, answers[0], recipe.data.control_tokens)
                return list(row["input_ids"][: len(prompt)]), prompt
        return None

    def write_files(
        self, folder: Path, processor: "PreTrainedTokenizerBase", recipe: CausalLmRecipe, split: "TextData"
    ) -> None:
        """Write the chat template, and hashes of the training rows."""
        from haori.data import template_of
        from haori.data.seen import SeenRows

        (folder / "chat_template.jinja").write_text(template_of(processor), encoding="utf-8")
        SeenRows.of(_conversations(split.train)).write(folder)

    def card(self, processor: "PreTrainedTokenizerBase", recipe: CausalLmRecipe) -> dict[str, Any]:
        """Return the hash of the chat template."""
        from haori.data import template_hash

        return {"template_hash": template_hash(processor)}

    def read(self, section: TextSection) -> "tuple[list[Conversation], DataReference, tuple[str, ...]]":
        """Read conversations and plain texts."""
        from haori.data import read_conversations

        rows, report = read_conversations(section)
        dropped = (f"Rows dropped: {report.dropped}.",) if report.dropped else ()
        return rows, report.reference(), (*dropped, *report.notes)

    def held_out(self, split: "TextData") -> "list[Conversation]":
        """Return the conversations held out."""
        return [*_conversations(split.validation)]

    def as_trained(
        self, rows: "Sequence[Conversation]", card: "AdapterCard"
    ) -> "tuple[Sequence[Conversation], tuple[str, ...]]":
        """Give rows without a system message the one trained with."""
        asked = [row.with_system(card.system) for row in rows]
        changed = sum(row is not given for row, given in zip(asked, rows, strict=True))
        notes = (f"Rows without a system message got the one trained with: {changed:,}.",) if changed else ()
        return asked, notes

    def seen(self, folder: Path, rows: "Sequence[Conversation]") -> list[str] | None:
        """Look for rows among the hashes kept beside the adapter."""
        from haori.data.seen import SeenRows

        known = SeenRows.read(folder)
        return None if known is None else [row.origin for row in known.among(rows)]

    def leaks(self, rows: "Sequence[Conversation]", split: "TextData") -> "Leaks":
        """Compare rows with the training rows."""
        from haori.data.leaks import find_leaks

        return find_leaks(rows, _conversations(split.train))

    def options(self, section: TextSection) -> MeasureOptions:
        """Return how control tokens in messages are read."""
        return MeasureOptions(control_tokens=section.control_tokens)

    def examine(
        self,
        model: "nn.Module",
        processor: "PreTrainedTokenizerBase",
        rows: "Sequence[Conversation]",
        options: MeasureOptions,
    ) -> "TextExamination":
        """Render and tokenise rows, and decide which metrics apply."""
        from haori.tasks.causal_lm.examination import TextExamination

        return TextExamination(model, processor, rows, options)

    def general_losses(
        self, model: "nn.Module", processor: "PreTrainedTokenizerBase", own: str | None
    ) -> "dict[str, TextLosses]":
        """Score the shipped passages, and the user's."""
        from haori.tasks.causal_lm.forgetting_texts import general_texts, own_texts, text_losses

        texts = {"shipped": general_texts()}
        if own is not None:
            texts["own"] = own_texts(own)
        return {name: text_losses(model, processor, passages) for name, passages in texts.items()}

    def check_general(self, own: str | None) -> None:
        """Read the user's text once."""
        from haori.tasks.causal_lm.forgetting_texts import own_texts

        if own is not None:
            own_texts(own)

    def statistics(self, rows: "Sequence[AnsweredRow]", labels: Sequence[str]) -> "dict[str, Statistic]":
        """Return accuracy and F1 of labels, chrF and BLEU of texts, perplexity."""
        from haori.tasks.causal_lm.metric_groups import statistics_of

        return statistics_of(rows, labels)


def _conversations(rows: "Dataset") -> "Iterator[Conversation]":
    from haori.data import Conversation

    for row in rows.select_columns(["conversation", "origin"]):
        yield Conversation.from_json(row["conversation"], row["origin"])


TASK = CausalLm()
