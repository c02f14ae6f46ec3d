"""Conversations made ready to measure: prompt, reference answer and rendered row, each in tokens.

The reference is the last assistant message; the prompt is what comes before it. Rows that cannot be measured
are left out and counted, never dropped in silence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from haori.core.errors import DataError
from haori.core.token_ids import no_embedding
from haori.data import ControlTokens, Conversation, RenderedRow, render_row, render_row_prompt, template_of
from haori.data.conversation import said
from haori.data.reasoning import ReasoningCount

__all__ = ["Example", "context_length", "prepare"]


@dataclass(frozen=True)
class Example:
    """One measurable row.

    Attributes:
        index: Its place in the data given.
        origin: Where it came from, e.g. `reviews.jsonl:12`.
        conversation: The messages up to and including the reference answer; plain text has none.
        reference: The reference answer, stripped; None for plain text.
        prompt: Token ids of the prompt, ending where the answer starts.
        row: Token ids and labels of the whole conversation.
    """

    index: int
    origin: str
    conversation: Conversation
    reference: str | None
    prompt: list[int]
    row: RenderedRow

    @property
    def trained_tokens(self) -> int:
        """Return how many tokens carry a label."""
        return sum(label != -100 for label in self.row.labels[1:])


def prepare(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    longest: int,
    embeddings: int | None = None,
    control_tokens: ControlTokens = "text",
) -> tuple[list[Example], list[str]]:
    """Return the measurable rows, and a sentence for each kind of row left out.

    Args:
        tokenizer: The base's tokenizer, with its chat template.
        conversations: The rows as read.
        longest: Tokens that fit the model.
        embeddings: Tokens that the model has embeddings for; None lets every token pass.
        control_tokens: How control tokens in messages are read.

    Raises:
        DataError: No row can be measured, or the chat template refuses one.
    """
    if not conversations:
        raise DataError("There is no row to measure on: the data is empty; give at least one row.")
    examples: list[Example] = []
    unanswered: list[str] = []
    long: list[str] = []
    unknown: list[str] = []
    lacking = ""
    reasoning = ReasoningCount(tokenizer, template_of(tokenizer))
    for index, conversation in enumerate(conversations):
        example = _example(tokenizer, index, conversation, control_tokens)
        if example is None:
            unanswered.append(conversation.origin)
        elif len(example.row.input_ids) > longest or len(example.prompt) >= longest:
            long.append(conversation.origin)
        elif (found := no_embedding(tokenizer, example.row.input_ids, embeddings)) is not None:
            lacking = lacking or found
            unknown.append(conversation.origin)
        else:
            examples.append(example)
            reasoning.add(example.conversation)
    total = len(conversations)
    notes = list(reasoning.notes())
    if unanswered:
        notes.append(_left_out(unanswered, total, "have no reference answer"))
    if long:
        notes.append(_left_out(long, total, f"are longer than the model's {longest:,} tokens"))
    if unknown:
        notes.append(_left_out(unknown, total, f"hold a token without embedding ({lacking})"))
    if not examples:
        reasons = " ".join(notes)
        raise DataError(f"No row can be measured. {reasons} A row needs an assistant message to compare with.")
    return examples, notes


def context_length(model: Any) -> int:
    """Return how many tokens the model's positions allow; very many where it does not say."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _example(tokenizer: Any, index: int, conversation: Conversation, control_tokens: ControlTokens) -> Example | None:
    messages = conversation.messages
    if not messages:
        row = render_row(tokenizer, conversation)
        return Example(index, conversation.origin, conversation, None, [], row)
    answered = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answered or not said(messages[answered[-1]]).strip():
        return None
    last = answered[-1]
    asked = replace(conversation, messages=messages[: last + 1])
    row = render_row(tokenizer, asked, control_tokens=control_tokens)
    prompt = render_row_prompt(tokenizer, conversation, last, control_tokens)
    reference = messages[last]["content"].strip()
    if messages[last].get("tool_calls"):  # as the model is to write it
        reference = str(tokenizer.decode(row.input_ids[len(prompt) :], skip_special_tokens=True)).strip()
    return Example(index, conversation.origin, asked, reference, prompt, row)


def _left_out(origins: Sequence[str], total: int, why: str) -> str:
    first = f" (the first: {origins[0]})" if origins[0] else ""
    return f"{len(origins)} of {total} rows {why} and were left out{first}."
