"""The whole way of preference data: read, clean, render, split by prompt, and keep in Arrow under the cache.

The result is keyed by content (bytes of the sources, settings, template and tokenizer), so a second run takes it
from the cache, and a changed file never meets an old result. All pairs of a prompt are on one side of the split.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError
from haori.core.hashing import hash_data, hash_parts, short
from haori.core.records import DataReference
from haori.core.settings import settings
from haori.core.storage import staged_folder
from haori.data.arrow_rows import arrow_rows, keep_report, open_kept
from haori.data.leaks import find_leaks
from haori.data.progress import tracked
from haori.data.reading import Tally
from haori.data.report import Leaks, histogram_of
from haori.data.selection import training_sources
from haori.data.show import report_table
from haori.data.sources import Source
from haori.data.split import choose_validation
from haori.data.template import template_hash, tokenizer_hash
from haori.data.tokenise import resolve_max_length
from haori.tasks.preference.pairs import Judged, Pair
from haori.tasks.preference.reading import DROPPED, PreferenceReader, explain_nothing
from haori.tasks.preference.recipe import PreferenceData
from haori.tasks.preference.report import PreferenceReport
from haori.tasks.preference.writing import Written, write_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from datasets import Dataset
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

    from haori.data.conversation import Conversation

__all__ = ["PreferenceRows", "load_preferences"]

_VERSION = 1  # of everything below; a change makes cached results unknown
_COUNTED = ("read", "empty", "duplicates", "broken", "control_characters", "too_long", "untrained", *DROPPED)


@dataclass(frozen=True)
class PreferenceRows:
    """A dataset ready for training; the columns of both parts are those of `writing.SCHEMA`."""

    train: "Dataset"
    validation: "Dataset"
    report: PreferenceReport

    @property
    def notes(self) -> "Sequence[str]":
        """Return what a user should know of the reading."""
        dropped = f"Rows left out: {self.report.dropped}." if self.report.dropped else None
        return (*([dropped] if dropped else []), *self.report.notes)

    @property
    def refused(self) -> bool:
        """Say whether nothing can be trained on these rows."""
        return self.report.refused

    def reference(self) -> DataReference:
        """Return the short form that cards and runs keep."""
        return self.report.reference()

    def table(self) -> "RenderableType":
        """Return the whole report, for a terminal."""
        return report_table(self.report)


def load_preferences(
    section: PreferenceData,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    one_by_one: bool,
    context_length: int,
    embeddings: int | None = None,
    tolerant: bool = False,
) -> PreferenceRows:
    """Return the tokenised splits of a data section, from the cache when nothing has changed.

    Args:
        section: The data and how to read it.
        tokenizer: The base's.
        one_by_one: Whether answers are judged one by one (KTO), not compared in pairs.
        context_length: The base's, in tokens.
        embeddings: Tokens that the base has embeddings for; None lets every token pass.
        tolerant: Go on after broken rows and list them in the report.

    Raises:
        DataError: The data cannot be found, read or trained on; the message names file, row and field.
        StorageError: The cache cannot be written.
    """
    if embeddings is not None and embeddings > max(tokenizer.get_vocab().values(), default=0):
        embeddings = None  # every token has one, so it plays no part in the key
    max_length = resolve_max_length(section.max_length, context_length)
    sources = training_sources(section)
    given = section.model_dump(mode="json", exclude={"licence", "attribution", "max_length"})
    content = [[source.content_hash, source.remarks] for source in sources]
    model = [template_hash(tokenizer), tokenizer_hash(tokenizer), embeddings]
    key = hash_data(["preference", _VERSION, content, given, max_length, *model, one_by_one, tolerant])
    folder = settings().cache / "data" / short(key)
    found = open_kept(folder, PreferenceReport)
    if found is None:
        build = _Build(section, sources, tokenizer, max_length, embeddings, one_by_one, tolerant)
        with staged_folder(folder) as stage:
            build.write(stage)
        found = open_kept(folder, PreferenceReport)
    assert found is not None
    kept, report = found
    return PreferenceRows(*kept, report.with_fields(licence=section.licence, attribution=section.attribution))


@dataclass
class _Build:
    """Writes rows, the mask of held-out rows, and the report into a folder."""

    section: PreferenceData
    sources: list[Source]
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    embeddings: int | None
    one_by_one: bool
    tolerant: bool

    def write(self, stage: Path) -> None:
        import numpy as np

        reader = PreferenceReader(self.section, self.one_by_one, self.tolerant)
        tallies = [Tally() for _ in self.sources]
        limits = [self.section.max_rows, None]
        streams = [
            (reader.stream(source, tally, limit), tally)
            for source, tally, limit in zip(self.sources, tallies, limits, strict=False)
        ]
        written = write_rows(
            stage, streams, tokenizer=self.tokenizer, section=self.section,
            max_length=self.max_length, embeddings=self.embeddings, tolerant=self.tolerant,
        )  # fmt: skip
        refusals: list[str] = []
        notes: list[str] = []
        held = np.zeros(len(written.length), dtype=bool)
        try:
            self._require_rows(tallies)
            held, notes = self._held_out(written, tallies)
            self._require_kinds(written, held)
        except DataError as error:
            if not self.tolerant:
                raise
            refusals.append(str(error))
        report = self._report(stage, tallies, written, held, notes, refusals)
        keep_report(stage, held, report)

    def _held_out(self, written: Written, tallies: list[Tally]) -> tuple[Any, list[str]]:
        """Choose the rows for validation by their prompts."""
        import numpy as np

        held = np.zeros(len(written.length), dtype=bool)
        if len(self.sources) > 1:
            held[_usable(tallies[0]) :] = True
            return held, []
        prompts = np.array(written.by_prompt)
        if self.section.validation_share and np.all(prompts == prompts[0]):
            raise DataError(
                f"All {len(prompts)} rows answer the same prompt, so none can be held out; add rows with other "
                "prompts, or give --set data.validation_share=0."
            )
        held, note = choose_validation(np.array(written.by_opening), prompts, self.section.validation_share)
        return held, [note] if note else []

    def _require_rows(self, tallies: list[Tally]) -> None:
        for source, tally in zip(self.sources, tallies, strict=True):
            if not _usable(tally):
                raise DataError(explain_nothing(source.name, tally.counts))
        if _usable(tallies[0]) == 1:
            raise DataError(
                f"{self.sources[0].name!r} has one row left; training needs at least two, one to learn from and one to "
                "check with."
            )

    def _require_kinds(self, written: Written, held: Any) -> None:
        """Refuse judged answers of one kind, or to one prompt only: the loss would say nothing."""
        import numpy as np

        if not self.one_by_one:
            return
        good, prompts = np.array(written.desirable, dtype=bool)[~held], np.array(written.by_prompt)[~held]
        if good.all() or not good.any():
            what = "good" if good.all() else "bad"
            raise DataError(f"All {len(good)} training rows are {what} answers; the loss kto needs some of both kinds.")
        if len(np.unique(prompts)) == 1:
            raise DataError(
                "All training rows answer the same prompt; the loss kto compares with answers to other prompts."
            )

    def _report(
        self,
        stage: Path,
        tallies: list[Tally],
        written: Written,
        held: Any,
        notes: list[str],
        refusals: list[str],
    ) -> PreferenceReport:
        leaks = _leaks(stage, held)
        template = template_hash(self.tokenizer)
        said = [line for source, tally in zip(self.sources, tallies, strict=True) for line in tally.notes(source)]
        found = [problem for tally in tallies for problem in tally.problems]
        if len(self.sources) > 1:
            found += leaks.examples[: leaks.exact]
        settings_of_rows = [template, self.max_length, self.one_by_one, self.section.control_tokens]
        return PreferenceReport(
            source=self.section.path,
            format="+".join(sorted(set().union(*(tally.formats for tally in tallies)))),
            hash=_hash(stage, held, settings_of_rows),
            template_hash=template,
            train_on="assistant",
            max_length=self.max_length,
            leaks=leaks,
            refused=bool(refusals),
            problems=(*found, *refusals),
            notes=(*said, *_counted_notes(tallies), *notes),
            **_figures(tallies, written, held, one_by_one=self.one_by_one),
        )


def _usable(tally: Tally) -> int:
    counts = tally.counts
    return counts["kept"] - counts["too_long"] - counts["untrained"] - counts["refused"] - counts["same_tokens"]


def _counted_notes(tallies: list[Tally]) -> list[str]:
    notes = []
    if opposite := sum(tally.counts["opposite"] for tally in tallies):
        notes.append(f"Rows that say the opposite of another row, kept: {opposite:,}.")
    if control := sum(tally.counts["control_tokens"] for tally in tallies):
        notes.append(f"Rows with a control token of this base (such as an end-of-turn): {control:,}.")
    return notes


def _prompts(rows: "Dataset", indices: Any, what: str | None = None) -> "Iterator[Conversation]":
    chosen = rows.select(indices).select_columns(["preference", "desirable", "origin"])

    def stream() -> "Iterator[Conversation]":
        for row in chosen:
            kind: type[Pair | Judged] = Pair if row["desirable"] is None else Judged
            yield kind.from_json(row["preference"], row["origin"]).prompt

    return tracked(stream(), what, total=len(chosen)) if what else stream()


def _leaks(stage: Path, held: Any) -> Leaks:
    """Compare the prompts of both splits."""
    import numpy as np

    rows = arrow_rows(stage)
    return find_leaks(_prompts(rows, np.flatnonzero(held)), _prompts(rows, np.flatnonzero(~held), "Looking for leaks"))


def _hash(stage: Path, held: Any, render_settings: list[Any]) -> str:
    hashes = (value.as_py() for chunk in arrow_rows(stage).data.column("hash").chunks for value in chunk)
    marked = (f"{value} {'validation' if is_held else 'train'}" for value, is_held in zip(hashes, held, strict=True))
    return hash_data(["preference", hash_parts(marked), *render_settings])


def _figures(tallies: list[Tally], written: Written, held: Any, *, one_by_one: bool) -> dict[str, Any]:
    """Return the report's figures."""
    import numpy as np

    length, trained = np.array(written.length, dtype=np.int64), np.array(written.trained, dtype=np.int64)
    good = np.array(written.desirable, dtype=bool)
    masks = {"train": ~held, "validation": held}
    counted = {name: sum(tally.counts[name] for tally in tallies) for name in _COUNTED}
    counted["same_answers"] += sum(tally.counts["same_tokens"] for tally in tallies)
    return counted | {
        "rows": {split: int(mask.sum()) for split, mask in masks.items()},
        "tokens": {split: int(length[mask].sum()) for split, mask in masks.items()},
        "trained_tokens": {split: int(trained[mask].sum()) for split, mask in masks.items()},
        "desirable": {split: int(good[mask].sum()) for split, mask in masks.items()} if one_by_one else {},
        "longest": int(length.max()) if len(length) else 0,
        "mean_length": float(length.mean()) if len(length) else 0.0,
        "median_length": float(np.median(length)) if len(length) else 0.0,
        "histogram": histogram_of(length),
    }
