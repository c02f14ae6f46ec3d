"""Renders preferences and writes them to one Arrow file, keeping of each only a few numbers in memory.

A row holds the token ids and labels of an answer with its prompt, and of the rejected answer where there is one. Only
the tokens of answers carry labels. Every row that is not written is counted.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError
from haori.core.token_ids import no_embedding
from haori.data.arrow_rows import write_arrow
from haori.data.control_tokens import special_texts
from haori.data.reading import Tally
from haori.data.rendered_row import RenderedRow, count_trained, render_row
from haori.data.split import point, points
from haori.tasks.preference.pairs import Judged
from haori.tasks.preference.reading import DROPPED, Preferred
from haori.tasks.preference.recipe import PreferenceData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Written", "write_rows"]


@dataclass
class Written:
    """Figures of the rows written, in order; lengths and trained tokens are those of both answers together."""

    length: "array[int]" = field(default_factory=lambda: array("i"))
    trained: "array[int]" = field(default_factory=lambda: array("i"))
    desirable: "array[int]" = field(default_factory=lambda: array("b"))
    by_opening: "array[float]" = field(default_factory=lambda: array("d"))
    by_prompt: "array[float]" = field(default_factory=lambda: array("d"))


def write_rows(
    folder: Path,
    splits: Iterable[tuple[Iterable[Preferred], Tally]],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    section: PreferenceData,
    max_length: int,
    embeddings: int | None,
    tolerant: bool,
) -> Written:
    """Render the rows of all splits into `folder`, and return their figures.

    Raises:
        DataError: The chat template refuses a row, a row is too long and that is an error, or it holds a token for
            which the base has none of its `embeddings` (not when `tolerant`).
    """
    writer = _Writer(tokenizer, section, max_length, embeddings, tolerant)
    writer.write(folder, splits)
    return writer.written


class _Writer:
    """Renders rows and writes those that can be trained on."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        section: PreferenceData,
        max_length: int,
        embeddings: int | None,
        tolerant: bool,
    ) -> None:
        self.written = Written()
        self._tokenizer, self._section, self._max_length = tokenizer, section, max_length
        self._embeddings, self._tolerant = embeddings, tolerant
        self._specials = special_texts(tokenizer)

    def write(self, folder: Path, splits: Iterable[tuple[Iterable[Preferred], Tally]]) -> None:
        """Write the rows of all splits, one split after the other."""
        import pyarrow as pa

        ids = pa.list_(pa.int32())
        schema = pa.schema(
            [("input_ids", ids), ("labels", ids), ("rejected_input_ids", ids), ("rejected_labels", ids),
             ("prompt_length", pa.int32()), ("length", pa.int32()), ("longest", pa.int32()), ("trained", pa.int32()),
             ("desirable", pa.bool_()), ("prompt", pa.float64()), ("hash", pa.string()), ("origin", pa.string()),
             ("preference", pa.string())]
        )  # fmt: skip
        kept = (self._row(row, tally) for rows, tally in splits for row in rows)
        write_arrow(folder, (row for row in kept if row is not None), schema)

    def _row(self, row: Preferred, tally: Tally) -> dict[str, Any] | None:
        """Return a row as it is kept; None for one that is left out."""
        try:
            sides = [self._rendered(row, side) for side in range(len(row.conversations))]
            reason = self._why_not(row, sides)
        except DataError as error:
            if not self._tolerant:
                raise
            tally.counts.update(("broken", "refused"))
            tally.add_problem(str(error))
            return None
        if reason is not None:
            name, words = reason
            tally.counts[name] += 1
            tally.add_problem(f"{row.prompt.origin}: {words}; the row is left out.")
            return None
        if any(text in side.body for side in row.conversations for text in self._specials):
            tally.counts["control_tokens"] += 1
        return self._kept(row, sides)

    def _rendered(self, row: Preferred, side: int) -> RenderedRow:
        conversation = row.conversations[side]
        rendered = render_row(self._tokenizer, conversation, "assistant", self._section.control_tokens)
        if (lacking := no_embedding(self._tokenizer, rendered.input_ids, self._embeddings)) is not None:
            raise DataError(f"{conversation.origin}: {lacking}.")
        return rendered

    def _why_not(self, row: Preferred, sides: list[RenderedRow]) -> tuple[str, str] | None:
        """Return why a row cannot be trained on: the name of its count, and words; None where it can."""
        if not all(count_trained(side.labels) for side in sides):
            return "untrained", "an answer carries no loss"
        ids = [side.input_ids for side in sides]
        if len(ids) > 1 and ids[0] == ids[1]:
            return "same_tokens", f"a row {DROPPED['same_answers']} in the base's tokens"
        prompts = [side.input_ids[: side.prompt_length] for side in sides]
        if any(prompt != prompts[0] for prompt in prompts):
            raise DataError(
                f"{row.prompt.origin}: the chat template of this base renders the shared prompt differently for the "
                "two answers, so they cannot be compared; use a base with another template."
            )
        longest = max(len(side) for side in ids)
        if longest <= self._max_length:
            return None
        words = f"prompt and answer have {longest} tokens and data.max_length is {self._max_length}"
        if self._section.too_long == "error":
            raise DataError(
                f"{row.prompt.origin}: {words}; shorten them, or let such rows go with --set data.too_long=drop."
            )
        return "too_long", words

    def _kept(self, row: Preferred, sides: list[RenderedRow]) -> dict[str, Any]:
        length = sum(len(side.input_ids) for side in sides)
        trained = sum(count_trained(side.labels) for side in sides)
        desirable = row.desirable if isinstance(row, Judged) else None
        of_prompt = point(row.prompt.body)
        self.written.length.append(length)
        self.written.trained.append(trained)
        self.written.desirable.append(bool(desirable))
        self.written.by_opening.append(points(row.conversations[0])[0])
        self.written.by_prompt.append(of_prompt)
        rejected = sides[1] if len(sides) > 1 else None
        return {
            "input_ids": sides[0].input_ids,
            "labels": sides[0].labels,
            "rejected_input_ids": None if rejected is None else rejected.input_ids,
            "rejected_labels": None if rejected is None else rejected.labels,
            "prompt_length": sides[0].prompt_length,
            "length": length,
            "longest": max(len(side.input_ids) for side in sides),
            "trained": trained,
            "desirable": desirable,
            "prompt": of_prompt,
            "hash": row.hash,
            "origin": row.prompt.origin,
            "preference": row.to_json(),
        }
