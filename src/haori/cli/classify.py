"""`haori classify`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from haori.core.records import Head
    from haori.tasks.classification.classifier import Classified

__all__ = ["classify"]

_ROWS_AT_ONCE = 512


def classify(
    name: Annotated[str, typer.Argument(help="Classifier in the library: name or name@version.")],
    text: Annotated[list[str] | None, typer.Option(help="A text to classify; may be given several times.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The second text of a pair, beside one --text.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Texts to classify: JSONL, CSV, Parquet, or TXT; answers keep their order.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the file with the text, where its name does not tell.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base to use; by default the one on the adapter's card.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per text.")] = False,
    allow_different_weights: Annotated[
        bool, typer.Option("--allow-different-weights", help="Accept a base of the same structure with other weights.")
    ] = False,
) -> None:
    """Print the label of a text, or of each row of a file, with probabilities."""
    from haori.core.errors import InputError
    from haori.tasks.classification.classifier import open_classifier
    from haori.tasks.classification.plain_texts import read_texts

    if bool(text) == (file is not None):
        raise InputError("Give texts with --text, or a file of them with --file.")
    if text_pair is not None and (text is None or len(text) != 1):
        raise InputError("--text-pair is the second text beside one --text.")
    if column is not None and file is None:
        raise InputError("--column names a column of --file; give both.")
    given: list[str | tuple[str, str]] = [*(text or [])]
    if text_pair is not None and text:
        given = [(text[0], text_pair)]
    if file is not None:
        given = read_texts(file, column)
    if any(not part.strip() for one in given for part in ([one] if isinstance(one, str) else one)):
        raise InputError("A text to classify is blank; give one with words.")
    classifier = open_classifier(name, base_spec=base, allow_different_weights=allow_different_weights)
    answers = (
        (one, answer)
        for start in range(0, len(given), _ROWS_AT_ONCE)
        for one, answer in zip(
            given[start : start + _ROWS_AT_ONCE], classifier.classify(given[start : start + _ROWS_AT_ONCE]), strict=True
        )
    )
    if as_json:
        _print_json(answers, classifier.head)
    elif len(given) == 1:
        _print_one(next(answers)[1], classifier.head)
    else:
        _print_table(answers, classifier.head)


def _print_json(answers: "Iterator[tuple[str | tuple[str, str], Classified]]", head: "Head") -> None:
    import json

    for one, answer in answers:
        asked: dict[str, Any] = {"text": one} if isinstance(one, str) else {"text": one[0], "text_pair": one[1]}
        typer.echo(json.dumps(asked | answer.to_json(head), ensure_ascii=False))


def _print_one(answer: "Classified", head: "Head") -> None:
    from rich.table import Table
    from rich.text import Text

    from haori.cli.console import results

    if answer.truncated:
        typer.echo("Note: the text is longer than the classifier reads, and was cut.", err=True)
    if head.kind == "token_classification":
        for word in answer.words:
            how_sure = "" if word.probability is None else f"  {word.probability:.1%}"
            results().print(Text.assemble(word.word, "  ", (word.label or "-", "bold"), (how_sure, "dim")))
        return
    table = Table.grid(padding=(0, 2))
    for label, share in answer.probabilities.items():
        chosen = label in answer.labels
        bar = "#" * round(30 * share)
        table.add_row(Text(label, style="bold" if chosen else ""), Text(f"{share:.1%}"), Text(bar, style="cyan"))
    results().print(table)
    if not answer.labels:
        typer.echo("No label holds: none has a probability of at least 50%.", err=True)


def _print_table(answers: "Iterator[tuple[str | tuple[str, str], Classified]]", head: "Head") -> None:
    from rich.table import Table
    from rich.text import Text

    from haori.cli.console import results
    from haori.data.readers import shorten

    table = Table("Label", "Probability", "Text", title_justify="left")
    cut = 0
    for one, answer in answers:
        cut += answer.truncated
        shown = shorten(one if isinstance(one, str) else " | ".join(one), 80)
        if head.kind == "token_classification":
            marked = " ".join(f"{w.word}/{w.label}" for w in answer.words if w.label not in (None, "O"))
            table.add_row(Text(marked or "-"), "", Text(shown))
            continue
        share = max(answer.probabilities.values()) if answer.labels else None
        table.add_row(Text(", ".join(answer.labels) or "-"), "" if share is None else f"{share:.1%}", Text(shown))
    results().print(table)
    if cut:
        typer.echo(f"Note: {cut} texts are longer than the classifier reads, and were cut.", err=True)
