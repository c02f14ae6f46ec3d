"""The whole way of text data: read, clean, render, split, check, and keep in Arrow under the cache.

The result is keyed by content (bytes of the sources, settings, template and tokenizer), so a second run takes it
from the cache, and a changed file never meets an old result.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError
from haori.core.hashing import hash_data, hash_parts, short
from haori.core.records import DataReference
from haori.core.settings import settings
from haori.core.storage import staged_folder
from haori.data.arrow_rows import arrow_rows, keep_report, open_kept
from haori.data.conversation import Conversation
from haori.data.leaks import find_leaks
from haori.data.progress import tracked
from haori.data.reading import Tally, explain_nothing, stream_rows
from haori.data.report import DataReport, Leaks, histogram_of
from haori.data.section import TextSection
from haori.data.selection import training_sources
from haori.data.sources import Source
from haori.data.split import choose_validation
from haori.data.template import template_hash, tokenizer_hash
from haori.data.tokenise import Written, resolve_max_length, write_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextData", "check_text", "load_text"]

_COUNTED = ("read", "empty", "duplicates", "broken", "control_characters", "too_long", "truncated", "untrained")
_VERSION = 3  # of everything below; a change makes cached results unknown


@dataclass(frozen=True)
class TextData:
    """A dataset ready for training.

    Both splits have the columns `input_ids`, `labels` (-100 where there is no loss), `length`, `trained` (both in
    tokens), `hash`, `origin` and `conversation` (JSON, see `Conversation.from_json`).
    """

    train: "Dataset"
    validation: "Dataset"
    report: DataReport

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a user should know of the reading."""
        dropped = (f"Rows dropped: {self.report.dropped}.",) if self.report.dropped else ()
        return (*dropped, *self.report.notes)

    @property
    def refused(self) -> bool:
        """Say whether nothing can be trained on these rows."""
        return self.report.refused

    def reference(self) -> DataReference:
        """Return the short form that cards and runs keep."""
        return self.report.reference()

    def table(self) -> "RenderableType":
        """Return the whole report, for a terminal."""
        from haori.data.show import report_table

        return report_table(self.report)


def load_text(
    section: TextSection,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context_length: int,
    embeddings: int | None = None,
) -> TextData:
    """Return the tokenised splits of a data section, from the cache when nothing has changed.

    Args:
        section: The data and how to read it.
        tokenizer: The base's.
        context_length: The base's, in tokens.
        embeddings: Tokens that the base has embeddings for; None lets every token pass.

    Raises:
        DataError: The data cannot be found, read or trained on; the message names file, row and field.
        StorageError: The cache cannot be written.
    """
    return _load(section, tokenizer, context_length, embeddings, tolerant=False)


def check_text(
    section: TextSection,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context_length: int,
    embeddings: int | None = None,
) -> TextData:
    """Do as `load_text` does, but go on after broken rows and list them in `report.problems`.

    Raises:
        DataError: A source cannot be found or understood at all.
    """
    return _load(section, tokenizer, context_length, embeddings, tolerant=True)


def _load(
    section: TextSection,
    tokenizer: "PreTrainedTokenizerBase",
    context_length: int,
    embeddings: int | None,
    *,
    tolerant: bool,
) -> TextData:
    max_length = resolve_max_length(section.max_length, context_length)
    if embeddings is not None and embeddings > max(tokenizer.get_vocab().values(), default=0):
        embeddings = None  # every token has one, so it plays no part in the key
    sources = training_sources(section)
    settings_of_rows = section.model_dump(mode="json", exclude={"licence", "attribution", "max_length"})
    content = [[source.content_hash, source.remarks] for source in sources]
    model = [template_hash(tokenizer), tokenizer_hash(tokenizer), embeddings]
    key = hash_data([_VERSION, content, settings_of_rows, max_length, *model, tolerant])
    folder = settings().cache / "data" / short(key)
    found = open_kept(folder, DataReport)
    if found is None:
        with staged_folder(folder) as stage:
            _build(stage, section, sources, tokenizer, max_length, embeddings, tolerant=tolerant)
        found = open_kept(folder, DataReport)
    assert found is not None
    kept, report = found
    return TextData(*kept, report.with_fields(licence=section.licence, attribution=section.attribution))


def _build(
    stage: Path,
    section: TextSection,
    sources: list[Source],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    embeddings: int | None,
    *,
    tolerant: bool,
) -> None:
    """Write rows, the mask of held-out rows, and the report into `stage`."""
    import numpy as np

    tallies = [Tally() for _ in sources]
    streams = [
        (stream_rows(section, source, tally, tolerant=tolerant, limit=limit), tally)
        for source, tally, limit in zip(sources, tallies, [section.max_rows, None], strict=False)
    ]
    written = write_rows(
        stage, streams, tokenizer=tokenizer, section=section, max_length=max_length,
        embeddings=embeddings, tolerant=tolerant,
    )  # fmt: skip
    note, problems = None, list[str]()
    held = np.zeros(len(written.length), dtype=bool)
    try:
        _require_rows(sources, tallies)
        if len(sources) > 1:
            held[_usable(tallies[0]) :] = True
        else:
            held, note = choose_validation(
                np.array(written.by_opening), np.array(written.by_body), section.validation_share
            )
    except DataError as error:
        if not tolerant:
            raise
        problems.append(str(error))
    refused = bool(problems)
    leaks = _leaks(stage, held)
    if len(sources) > 1:
        problems += leaks.examples[: leaks.exact]
    notes = [line for source, tally in zip(sources, tallies, strict=True) for line in tally.notes(source)]
    if control := sum(tally.counts["control_tokens"] for tally in tallies):
        how = "text" if section.control_tokens == "text" else "tokens"
        notes.append(f"Rows with a control token of this base (such as an end-of-turn), read as {how}: {control}.")
    template = template_hash(tokenizer)
    report = DataReport(
        source=section.path,
        format="+".join(sorted(set().union(*(tally.formats for tally in tallies)))),
        hash=_hash(stage, held, [template, max_length, section.train_on, *_allowed(section)]),
        template_hash=template,
        train_on=section.train_on,
        max_length=max_length,
        leaks=leaks,
        refused=refused,
        problems=(*(found for tally in tallies for found in tally.problems), *problems),
        notes=(*notes, *written.notes, *([note] if note else [])),
        **_figures(tallies, written, held),
    )
    keep_report(stage, held, report)


def _usable(tally: Tally) -> int:
    counts = tally.counts
    lost_later = counts["too_long"] + counts["untrained"] + counts["refused"]
    return counts["kept"] - lost_later


def _require_rows(sources: list[Source], tallies: list[Tally]) -> None:
    """Refuse a dataset of which a split would have nothing to train on or to measure."""
    for source, tally in zip(sources, tallies, strict=True):
        if not _usable(tally):
            raise DataError(explain_nothing(source.name, tally.counts) + _remedy(tally))
    if _usable(tallies[0]) == 1:
        read = tallies[0].counts["read"]
        left = "" if read == 1 else f" left of {read} read"
        raise DataError(
            f"{sources[0].name!r} has one row{left}; training needs at least two, one to learn from and one to check "
            "with."
        )


def _remedy(tally: Tally) -> str:
    if tally.counts["too_long"]:
        return " Raise data.max_length (up to the base's context), or shorten the prompts."
    return ' Let at least one answer be trained (no "loss": false).' if tally.counts["untrained"] else ""


def _conversations(rows: "Dataset", indices: Any, what: str | None = None) -> Iterator[Conversation]:
    chosen = rows.select(indices).select_columns(["conversation", "origin"])
    stream = (Conversation.from_json(row["conversation"], row["origin"]) for row in chosen)
    return tracked(stream, what, total=len(chosen)) if what else stream


def _leaks(stage: Path, held: Any) -> Leaks:
    import numpy as np

    rows = arrow_rows(stage)
    return find_leaks(
        _conversations(rows, np.flatnonzero(held)),
        _conversations(rows, np.flatnonzero(~held), "Looking for leaks"),
    )


def _allowed(section: TextSection) -> list[str]:
    """Return what the hash says of control tokens; nothing where they are text, as if there were no choice."""
    return ["control tokens"] if section.control_tokens == "allow" else []


def _hash(stage: Path, held: Any, render_settings: list[Any]) -> str:
    rows = arrow_rows(stage)
    hashes = (value.as_py() for chunk in rows.data.column("hash").chunks for value in chunk)
    marked = (f"{value} {'validation' if is_held else 'train'}" for value, is_held in zip(hashes, held, strict=True))
    return hash_data([hash_parts(marked), *render_settings])


def _figures(tallies: list[Tally], written: Written, held: Any) -> dict[str, Any]:
    """Return the report's figures."""
    import numpy as np

    length, trained = np.array(written.length, dtype=np.int64), np.array(written.trained, dtype=np.int64)
    masks = {"train": ~held, "validation": held}
    counted = {name: sum(tally.counts[name] for tally in tallies) for name in _COUNTED}
    return counted | {
        "rows": {split: int(mask.sum()) for split, mask in masks.items()},
        "tokens": {split: int(length[mask].sum()) for split, mask in masks.items()},
        "trained_tokens": {split: int(trained[mask].sum()) for split, mask in masks.items()},
        "longest": int(length.max()) if len(length) else 0,
        "mean_length": float(length.mean()) if len(length) else 0.0,
        "median_length": float(np.median(length)) if len(length) else 0.0,
        "histogram": histogram_of(length),
    }
