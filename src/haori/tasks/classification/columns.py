"""From raw rows to labelled ones: which columns hold text, pair, label, words and tags.

    text-label         text, label
    pair-label         sentence1, sentence2, label         (premise + hypothesis, question1 + question2, ...)
    tokens-tags        tokens, ner_tags                    (lists of equal length)
    the text task's    prompt, completion; messages; ...   (what the user says is the text, the answer the label)

Names are compared without case, and the form is found per file. Everything that is not as it should be is a
`DataError` that names file, row and field.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from haori.core.errors import DataError, nearest
from haori.data.cleaning import clean_text
from haori.data.columns import FileColumns
from haori.data.conversation import Conversation, said
from haori.data.formats import converter_for
from haori.data.readers import RawRow, shorten
from haori.data.row_problem import problem, value_of
from haori.data.section import TextSection
from haori.tasks.classification.labelled_row import LabelledRow
from haori.tasks.classification.recipe import ClassificationColumns, ClassificationData

__all__ = ["Converted", "Converter", "Form", "form_of", "text_columns"]

_TEXTS = ("text", "sentence", "review", "content", "comment", "tweet", "document", "body", "message", "utterance")
_LABELS = ("label", "labels", "category", "categories", "class", "sentiment", "intent", "topic", "emotion", "target")
_PAIRS = (
    ("sentence1", "sentence2"), ("text1", "text2"), ("text_a", "text_b"), ("premise", "hypothesis"),
    ("question1", "question2"), ("question", "sentence"), ("question", "passage"), ("text", "text_pair"),
)  # fmt: skip
_WORDS = ("tokens", "words")
_TAGS = ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags", "ner")


class Converted(NamedTuple):
    """A labelled row, and whether control characters were taken out of it."""

    row: LabelledRow
    dirty: bool


Converter = Callable[[RawRow], Converted | None]
"""Returns None for a row without a label, or without words."""


class Form(NamedTuple):
    """How the rows of a file are read.

    Attributes:
        name: For the report.
        problem: What the columns show; None where the values of the label decide.
        used: The columns that are read.
        convert: Reads one row.
    """

    name: str
    problem: str | None
    used: frozenset[str]
    convert: Converter


def form_of(section: ClassificationData, columns: FileColumns, file: str) -> Form:
    """Choose how the rows of a file are read.

    Raises:
        DataError: Its columns hold no text with labels.
    """
    if section.columns is not None:
        return _mapped(section, section.columns, list(columns.held), file)
    names = {name.strip().lower(): name for name in columns.filled() or columns.names()}
    given = _detect(names, section.problem)
    if given is not None:
        return _form(section, given)
    try:
        return _of_text_task(section, columns, file)
    except DataError:
        raise DataError(_unknown(list(names.values()), section, file)) from None


def text_columns(names: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the column of the text, or those of a pair, by their names in lower case; None where none is known."""
    for one, other in _PAIRS:
        if one in names and other in names:
            return names[one], names[other]
    found = next((names[name] for name in (*_TEXTS, "prompt", "question", "query") if name in names), None)
    return None if found is None else (found,)


def _detect(names: Mapping[str, str], wanted: str) -> ClassificationColumns | None:
    def first(known: Sequence[str], *taken: str | None) -> str | None:
        return next((names[name] for name in known if name in names and names[name] not in taken), None)

    tokens = first(_WORDS)
    if wanted in ("auto", "token") and tokens is not None and (tags := first(_TAGS)) is not None:
        return ClassificationColumns(tokens=tokens, tags=tags)
    label = first(_LABELS)
    if wanted == "token" or label is None:
        return None
    for one, other in _PAIRS:
        if one in names and other in names:
            return ClassificationColumns(text=names[one], text_pair=names[other], label=label)
    text = first(_TEXTS, label)
    return None if text is None else ClassificationColumns(text=text, label=label)


def _mapped(section: ClassificationData, given: ClassificationColumns, present: list[str], file: str) -> Form:
    named = [*(given.labels or ()), given.text, given.text_pair, given.label, given.tokens, given.tags]
    for name in named:
        if name is not None and name not in present:
            hint = nearest(name, present) or f"it has {_listed(present)}."
            raise DataError(f"{file} has no column {name!r}, which data.columns names; {hint}")
    of_words = given.tokens is not None and given.tags is not None
    of_texts = given.text is not None and (given.label is None) != (given.labels is None)
    if of_words == of_texts or (of_words and (given.text or given.label or given.labels or given.text_pair)):
        raise DataError(
            "data.columns must name text and label (or labels, one column each), or tokens and tags; beside a text it "
            "may name text_pair."
        )
    return _form(section, given)


def _form(section: ClassificationData, given: ClassificationColumns) -> Form:
    used = frozenset(
        name
        for name in (given.text, given.text_pair, given.label, given.tokens, given.tags, *(given.labels or ()))
        if name is not None
    )
    if given.tokens is not None and given.tags is not None:
        words, tags = given.tokens, given.tags
        _require(section, ("auto", "token"), "words with a label each")
        return Form("tokens-tags", "token", used, lambda raw: _of_words(raw, words, tags))
    _require(section, ("auto", "single_label", "multi_label"), "whole texts with labels")
    several = given.labels is not None or section.label_separator is not None

    def convert(raw: RawRow) -> Converted | None:
        text, dirty = _text(raw, str(given.text))
        pair, also = _text(raw, given.text_pair) if given.text_pair is not None else (None, False)
        labels = (
            _of_columns(raw, given.labels)
            if given.labels is not None
            else _labels(raw, str(given.label), section.label_separator)
        )
        return None if labels is None else Converted(LabelledRow(text, labels, raw.origin, pair), dirty or also)

    name = "text-label" if given.text_pair is None else "pair-label"
    return Form(name, "multi_label" if several else None, used, convert)


def _of_text_task(section: ClassificationData, columns: FileColumns, file: str) -> Form:
    """Read the answer of a conversation as the label of what the user says."""
    texts = TextSection(path=section.path)
    name, used, converted = converter_for(texts, columns.filled(), file)
    if name == "text" or section.problem == "token":
        raise DataError(f"{file} has no labels.")

    def convert(raw: RawRow) -> Converted | None:
        conversation = converted(raw)
        text, dirty = clean_text(_asked(raw, conversation))
        labels = _split(clean_text(said(conversation.messages[-1]))[0], section.label_separator)
        return Converted(LabelledRow(text, labels, raw.origin), dirty) if labels else None

    return Form(name, "multi_label" if section.label_separator is not None else None, used, convert)


def _asked(raw: RawRow, conversation: Conversation) -> str:
    turns = [message for message in conversation.messages if message["role"] != "system"]
    if [message["role"] for message in turns] != ["user", "assistant"]:
        raise problem(raw, "messages", "a classifier learns from one question and one answer, the label")
    return said(turns[0])


def _of_words(raw: RawRow, words: str, tags: str) -> Converted | None:
    tokens, labels = value_of(raw, words), value_of(raw, tags)
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise problem(raw, words, "this must be a list of texts, the words")
    if not isinstance(labels, list) or len(labels) != len(tokens):
        count = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise problem(raw, tags, f"this must be a list with a label for each of {len(tokens)} words, not {count}")
    if not tokens:
        return None
    cleaned = [clean_text(token) for token in tokens]
    named = tuple(_label(raw, tags, label) for label in labels)
    if "" in named:
        raise problem(raw, tags, "a word has no label; words outside of all entities are usually labelled O")
    row = LabelledRow(" ".join(token for token, _ in cleaned), named, raw.origin, None, tuple(t for t, _ in cleaned))
    return Converted(row, any(dirty for _, dirty in cleaned))


def _of_columns(raw: RawRow, columns: Iterable[str]) -> tuple[str, ...]:
    held = []
    for column in columns:
        value = value_of(raw, column)
        if value in (1, True, "1", "true", "True"):
            held.append(column)
        elif value not in (0, False, "0", "false", "False"):
            raise problem(
                raw, column, f"this must be 1 where the label holds and 0 where not, not {shorten(value, 40)}"
            )
    return tuple(sorted(held))


def _labels(raw: RawRow, column: str, separator: str | None) -> tuple[str, ...] | None:
    """Return the labels of a row; None where the cell is blank, an empty tuple where it is an empty list."""
    value = value_of(raw, column)
    if isinstance(value, list):
        named = {_label(raw, column, item) for item in value}
        if "" in named:
            raise problem(raw, column, "one of the labels in this list is blank")
        return tuple(sorted(named))
    label = _label(raw, column, value)
    return _split(label, separator) or None


def _split(label: str, separator: str | None) -> tuple[str, ...]:
    parts = [label] if separator is None else label.split(separator)
    return tuple(sorted({part.strip() for part in parts if part.strip()}))


def _label(raw: RawRow, column: str, value: Any) -> str:
    """Return a label's name; the empty string for none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return clean_text(value)[0].strip()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    raise problem(raw, column, f"a label is a name or a whole number, not {shorten(value, 40)}")


def _text(raw: RawRow, column: str) -> tuple[str, bool]:
    value = value_of(raw, column)
    if value is None:
        return "", False
    if not isinstance(value, str):
        raise problem(raw, column, f"this must be text, not {type(value).__name__} {shorten(value, 40)}")
    return clean_text(value)


def _require(section: ClassificationData, allowed: Sequence[str], what: str) -> None:
    if section.problem not in allowed:
        raise DataError(f"The columns hold {what}, but data.problem is {section.problem!r}; change one of them.")


def _unknown(present: list[str], section: ClassificationData, file: str) -> str:
    if section.problem == "token":
        needs, example = "tokens with tags", "--set data.columns.tokens=WORDS --set data.columns.tags=TAGS"
    else:
        first, second = [*present, "TEXT", "LABEL"][:2] if len(present) != 1 else (present[0], "LABEL")
        needs = "text with a label (text, sentence, review, ...; label, category, sentiment, ...)"
        example = f"--set data.columns.text={first} --set data.columns.label={second}"
    return f"{file} has the columns {_listed(present)}: no {needs}; say which is which with {example}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:12])
    return (shown or "none") + (f" and {len(names) - 12} more" if len(names) > 12 else "")
