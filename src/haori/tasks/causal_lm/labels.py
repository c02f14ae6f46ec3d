"""Label tasks: is this one, what are its labels, and which tokens does the model answer them with.

A label's tokens are those that the training render gives it, so that the score is of what training teaches.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from haori.core.errors import DataError, nearest
from haori.data import Conversation, Message, render_row

__all__ = ["LabelTokens", "check_labels", "detect_labels", "label_tokens"]

_MOST_LABELS = 20
_LEAST_TIMES = 2
_LEAST_MEAN_TIMES = 3
_MOST_WORDS = 5


class LabelTokens(NamedTuple):
    """Token ids of each label as the model would answer it.

    Attributes:
        ids: One list per label, with the end-of-turn token last if `with_end` is set.
        with_end: Whether the end of turn is part of the answer: one label's tokens begin another's.
    """

    ids: list[list[int]]
    with_end: bool


def detect_labels(references: Sequence[str]) -> tuple[str, ...] | None:
    """Return the sorted labels if the reference answers look like a label task, else None.

    A label task has 2 to 20 distinct answers of at most 5 words, each given at least twice and 3 times on
    average.
    """
    counts = Counter(reference.strip() for reference in references)
    if not 2 <= len(counts) <= _MOST_LABELS or min(counts.values()) < _LEAST_TIMES:
        return None
    if len(references) < _LEAST_MEAN_TIMES * len(counts):
        return None
    if any(not 1 <= len(label.split()) <= _MOST_WORDS for label in counts):
        return None
    return tuple(sorted(counts))


def check_labels(labels: Sequence[str], references: Sequence[str]) -> tuple[str, ...]:
    """Return the labels, stripped, in the order given, after comparing them with the reference answers.

    Raises:
        DataError: Fewer than two, one twice, one that no row has, or a row whose answer is none of them.
    """
    names = tuple(label.strip() for label in labels)
    if len(names) < 2 or "" in names:
        raise DataError(f"The labels {list(labels)!r} cannot be chosen between: give at least two, none empty.")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"The label {twice!r} is given twice; give each label once.")
    counts = Counter(reference.strip() for reference in references)
    for name in names:
        if name not in counts:
            hint = nearest(name, counts) or f"The answers are {_listed(counts)}."
            raise DataError(f"The label {name!r} is the answer of no row; {hint}")
    others = {answer: count for answer, count in counts.items() if answer not in names}
    if others:
        rows = sum(others.values())
        raise DataError(
            f"{rows} of {len(references)} rows have an answer that is not among the labels {list(names)!r}: "
            f"{_listed(others)}; add them to the labels or give labels='none'."
        )
    return names


def label_tokens(tokenizer: Any, conversations: Sequence[Conversation], labels: Sequence[str]) -> LabelTokens:
    """Return the tokens of each label as an answer, the way training would render it.

    White space around a label is as most of its answers have it. If the tokens of one label begin those of
    another, the end-of-turn token joins the score of all, or the longer could never win.

    Args:
        tokenizer: The base's tokenizer.
        conversations: The rows; the last message of each is the answer.
        labels: The labels, stripped.

    Raises:
        DataError: Two labels have the same tokens.
    """
    forms = Counter(conversation.messages[-1]["content"] for conversation in conversations)
    written = [next(form for form, _ in forms.most_common() if form.strip() == label) for label in labels]
    prompt = conversations[0].messages[:-1]
    contents, ends = zip(*(_answer_tokens(tokenizer, prompt, form) for form in written), strict=True)
    for place, content in enumerate(contents):
        if content in contents[:place]:
            other = labels[contents.index(content)]
            raise DataError(f"The labels {other!r} and {labels[place]!r} are the same to the tokenizer; keep one.")
    with_end = any(one is not other and other[: len(one)] == one for one in contents for other in contents)
    ids = [content + end if with_end else content for content, end in zip(contents, ends, strict=True)]
    return LabelTokens(ids, with_end)


def _answer_tokens(tokenizer: Any, prompt: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
    """Return the tokens of the answer itself and the end-of-turn token after it."""
    messages = (*prompt, Message(role="assistant", content=answer))
    labels = render_row(tokenizer, Conversation(messages=messages, origin="")).labels
    start = max(place for place, label in enumerate(labels) if label == -100) + 1
    tail = list(labels[start:])  # the last answer and its end of turn
    for length in range(1, len(tail)):
        if tokenizer.decode(tail[:length]).strip().endswith(answer.strip()):
            return tail[:length], tail[length : length + 1]
    return tail[:-1], tail[-1:]


def _listed(answers: Sequence[str] | dict[str, int], limit: int = 5) -> str:
    shown = [repr(answer if len(answer) <= 40 else answer[:40] + "...") for answer in list(answers)[:limit]]
    return ", ".join(shown) + (f" and {len(answers) - limit} more" if len(answers) > limit else "")
