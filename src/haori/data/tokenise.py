"""Writes tokenised rows to one Arrow file, and keeps of each row only a few numbers in memory.

Rows are written in batches, so data may be larger than memory. Every row that is not written is counted.
"""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from haori.core.errors import DataError
from haori.core.token_ids import no_embedding
from haori.data.arrow_rows import write_arrow
from haori.data.control_tokens import special_texts
from haori.data.conversation import Conversation
from haori.data.reading import Tally
from haori.data.reasoning import ReasoningCount
from haori.data.rendered_row import RenderedRow, count_trained, render_row
from haori.data.section import TextSection
from haori.data.split import points
from haori.data.template import template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Written", "resolve_max_length", "write_rows"]

DEFAULT_MAX_LENGTH = 2048


@dataclass
class Written:
    """Figures of the rows written, in order: tokens, trained tokens, and points of the split; and remarks."""

    length: "array[int]" = field(default_factory=lambda: array("i"))
    trained: "array[int]" = field(default_factory=lambda: array("i"))
    by_opening: "array[float]" = field(default_factory=lambda: array("d"))
    by_body: "array[float]" = field(default_factory=lambda: array("d"))
    notes: list[str] = field(default_factory=list)


def resolve_max_length(wanted: int | Literal["auto"], context_length: int) -> int:
    """Return the longest row in tokens: as given, or 2048, or the context when that is shorter.

    Raises:
        DataError: More was asked for than the base can read.
    """
    if wanted == "auto":
        return min(DEFAULT_MAX_LENGTH, context_length)
    if wanted > context_length:
        raise DataError(
            f"data.max_length is {wanted}, but this base reads at most {context_length} tokens; "
            "give a smaller one, or leave it at auto."
        )
    return wanted


class RowWriter:
    """Renders rows and writes those that can be trained on."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        section: TextSection,
        max_length: int,
        *,
        embeddings: int | None,
        tolerant: bool,
    ) -> None:
        self.written = Written()
        self._tokenizer = tokenizer
        self._section = section
        self._max_length = max_length
        self._embeddings = embeddings
        self._tolerant = tolerant
        self._specials = special_texts(tokenizer)
        self.reasoning = ReasoningCount(tokenizer, template_of(tokenizer))
        self.texts_apart = 0

    def write(self, folder: Path, splits: Iterable[tuple[Iterable[Conversation], Tally]]) -> None:
        """Write the rows of all splits into `folder`, one split after the other."""
        import pyarrow as pa

        schema = pa.schema(
            [("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("length", pa.int32()),
             ("trained", pa.int32()), ("hash", pa.string()), ("origin", pa.string()), ("conversation", pa.string())]
        )  # fmt: skip
        kept = (self._row(row, tally) for rows, tally in splits for row in rows)
        write_arrow(folder, (row for row in kept if row is not None), schema)

    def _row(self, row: Conversation, tally: Tally) -> dict[str, Any] | None:
        """Return a row as it is kept; None for one that is left out."""
        try:
            rendered = self._fit(row, self._rendered(row), tally.counts)
        except DataError as error:
            if not self._tolerant:
                raise
            tally.counts["broken"] += 1
            tally.counts["refused"] += 1
            tally.add_problem(str(error))
            return None
        if rendered is None:
            return None
        self.reasoning.add(row)
        self.texts_apart += rendered.texts_apart
        if any(text in row.body for text in self._specials):
            tally.counts["control_tokens"] += 1
        trained = count_trained(rendered.labels)
        by_opening, by_body = points(row)
        self.written.length.append(len(rendered.input_ids))
        self.written.trained.append(trained)
        self.written.by_opening.append(by_opening)
        self.written.by_body.append(by_body)
        return {
            "input_ids": rendered.input_ids,
            "labels": rendered.labels,
            "length": len(rendered.input_ids),
            "trained": trained,
            "hash": row.hash,
            "origin": row.origin,
            "conversation": row.to_json(),
        }

    def _rendered(self, row: Conversation) -> RenderedRow:
        rendered = render_row(self._tokenizer, row, self._section.train_on, self._section.control_tokens)
        if (lacking := no_embedding(self._tokenizer, rendered.input_ids, self._embeddings)) is not None:
            raise DataError(f"{row.origin}: {lacking}.")
        return rendered

    def _fit(self, row: Conversation, rendered: RenderedRow, counts: Counter[str]) -> RenderedRow | None:
        """Apply `max_length`; None for a row that is dropped."""
        if not count_trained(rendered.labels):
            counts["untrained"] += 1
            return None
        length = len(rendered.input_ids)
        if length <= self._max_length:
            return rendered
        if self._section.too_long == "error":
            raise DataError(
                f"{row.origin}: the row has {length} tokens and data.max_length is {self._max_length}; shorten it, or "
                "let such rows go with --set data.too_long=drop (or truncate)."
            )
        cut = RenderedRow(
            rendered.input_ids[: self._max_length],
            rendered.labels[: self._max_length],
            rendered.prompt_length,
            rendered.texts_apart,
        )
        if self._section.too_long == "drop" or not count_trained(cut.labels):
            counts["too_long"] += 1
            return None
        counts["truncated"] += 1
        return cut


def write_rows(
    folder: Path,
    splits: Iterable[tuple[Iterable[Conversation], Tally]],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    section: TextSection,
    max_length: int,
    embeddings: int | None,
    tolerant: bool,
) -> Written:
    """Render the rows of all splits into `folder`, and return their figures.

    Raises:
        DataError: The chat template refuses a row, a row is too long and that is an error, or it holds a token for
            which the base has none of its `embeddings` (not when `tolerant`).
    """
    writer = RowWriter(tokenizer, section, max_length, embeddings=embeddings, tolerant=tolerant)
    writer.write(folder, splits)
    writer.written.notes.extend(writer.reasoning.notes())
    if writer.texts_apart:
        writer.written.notes.append(
            "Texts beside calls of tools, which this base's chat template shows only as turns of their own, so they "
            f"are context and not trained: {writer.texts_apart:,}."
        )
    return writer.written
