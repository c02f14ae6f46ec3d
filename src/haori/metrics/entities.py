"""Metrics of labelled tokens: token accuracy, and precision, recall and F1 of the entities that BIO labels mark.

An entity is right when its type and both its ends are (CoNLL-2003). Labels are read strictly as IOB2: an entity begins
with B- and goes on with I- of the same type; an I- that continues nothing marks no entity.
"""

from collections.abc import Iterable, Sequence

from haori.metrics.statistics import Statistic, ratio_sums

__all__ = ["Entity", "entities_of", "entity_statistics", "is_bio", "token_accuracy"]

Entity = tuple[str, int, int]
Tags = Sequence[str]


def is_bio(labels: Iterable[str]) -> bool:
    """Say whether the labels mark entities: B-TYPE for at least one type, and otherwise only I-TYPE and O."""
    names = [*labels]
    return any(name.startswith("B-") for name in names) and all(
        name == "O" or name.startswith(("B-", "I-")) for name in names
    )


def entities_of(tags: Tags) -> set[Entity]:
    """Return the entities of one row: type, first token, and the token after the last."""
    found = set()
    kind, start = None, 0
    for place, tag in enumerate([*tags, "O"]):
        if kind is not None and tag != f"I-{kind}":
            found.add((kind, start, place))
            kind = None
        if tag.startswith("B-"):
            kind, start = tag.removeprefix("B-"), place
    return found


def token_accuracy(answers: Sequence[Tags], references: Sequence[Tags]) -> Statistic:
    """Right tokens / tokens, over all rows.

    Args:
        answers: Labels of the counted tokens of each row.
        references: The labels that they should have.
    """
    right = [sum(a == r for a, r in zip(*pair, strict=True)) for pair in zip(answers, references, strict=True)]
    return ratio_sums(right, [len(row) for row in references])


def entity_statistics(answers: Sequence[Tags], references: Sequence[Tags]) -> dict[str, Statistic]:
    """Return entity precision, recall and F1, micro over all rows and types.

    With nothing predicted, precision is 0; recall is not defined where no entity is expected, nor is F1 where there is
    none on either side.

    Args:
        answers: BIO labels of the counted tokens of each row.
        references: The labels that they should have.
    """
    pairs = [(entities_of(given), entities_of(expected)) for given, expected in zip(answers, references, strict=True)]
    right = [len(given & expected) for given, expected in pairs]
    predicted = [len(given) for given, _ in pairs]
    expected = [len(wanted) for _, wanted in pairs]
    twice = [2 * count for count in right]
    both = [given + wanted for given, wanted in zip(predicted, expected, strict=True)]
    return {
        "entity_f1": ratio_sums(twice, both),
        "entity_precision": ratio_sums(right, predicted, undefined=0.0),
        "entity_recall": ratio_sums(right, expected),
    }
