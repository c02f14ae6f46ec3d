"""From a data section to clean pairs or judged answers, as a stream, with every row that was left out counted.

Needs no tokenizer. Scored answers that stand one to a row are gathered by prompt, which takes memory for all of them;
everything else is streamed. A 16-byte hash of each pair is kept to find duplicates and contradictions.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from haori.core.errors import DataError
from haori.core.hashing import hash_data
from haori.data.cleaning import clean_row, is_empty
from haori.data.columns import FileColumns, survey
from haori.data.conversation import Conversation, said
from haori.data.progress import tracked
from haori.data.readers import RawRow
from haori.data.reading import Tally
from haori.data.sources import Source
from haori.tasks.preference.formats import Answered, RowReader, row_reader
from haori.tasks.preference.pairs import Judged, Pair, Unpaired, judged_of, pair_of
from haori.tasks.preference.recipe import PreferenceData

__all__ = ["DROPPED", "OnlyJudgedError", "PreferenceReader", "Preferred", "explain_nothing"]

Preferred = Pair | Judged

DROPPED = {
    "same_answers": "with the same answer twice",
    "prompts_differ": "whose prompts differ",
    "ties": "with equal scores",
    "alone": "with the only scored answer to its prompt",
    "contradicted": "whose scores say the opposite",
}
"""Why a row makes no pair, by the name of its count."""


class OnlyJudgedError(DataError):
    """Rows say of single answers whether they are good, and the loss compares pairs."""


@dataclass
class PreferenceReader:
    """Reads sources for one kind of loss.

    Attributes:
        section: Format, columns and system message.
        one_by_one: Whether answers are judged one by one (KTO), not compared in pairs.
        tolerant: Note broken rows as problems and go on, instead of raising.
    """

    section: PreferenceData
    one_by_one: bool
    tolerant: bool = False

    def stream(self, source: Source, tally: Tally, limit: int | None = None) -> Iterator[Preferred]:
        """Yield the clean, distinct pairs or judged answers of a source and count the others in `tally`.

        Raises:
            DataError: A row or file cannot be understood (a row only when not `tolerant`).
        """
        seen: set[bytes] = set()
        for found in self._preferred(source, tally, limit):
            digest, opposite = _digest(found.hash), _digest(found.swapped_hash)
            if digest in seen:
                tally.counts["duplicates"] += 1
                continue
            if opposite in seen:
                tally.counts["opposite"] += 1
                tally.add_problem(f"{found.prompt.origin}: another row says the opposite of this one; both are kept.")
            seen.add(digest)
            tally.counts["kept"] += 1
            yield found

    def _preferred(self, source: Source, tally: Tally, limit: int | None) -> Iterator[Preferred]:
        gathered: dict[str, list[Answered]] = {}
        for reader, answers in self._answers(source, tally, limit):
            if reader.alone:
                for answer in answers:
                    gathered.setdefault(_prompt_hash(answer.row), []).append(answer)
            else:
                yield from self._of_row(reader, answers, tally)
        for answers in gathered.values():
            yield from self._of_scores(answers, tally)

    def _of_row(self, reader: RowReader, answers: Sequence[Answered], tally: Tally) -> Iterator[Preferred]:
        first = answers[0]
        if reader.kind == "judged":
            if not self.one_by_one:
                raise OnlyJudgedError(
                    f"{first.row.origin}: the rows say of single answers whether they are good, and only the loss kto "
                    "learns from those; use --set loss.kind=kto, or give pairs (chosen, rejected)."
                )
            assert first.desirable is not None
            yield judged_of(first.row, desirable=first.desirable)
        elif reader.kind == "rated":
            yield from self._of_scores(answers, tally)
        else:
            better, worse = answers
            if better.score is not None and worse.score is not None and better.score <= worse.score:
                self._leave("ties" if better.score == worse.score else "contradicted", first.row, tally)
                return
            yield from self._compared(better.row, worse.row, tally)

    def _of_scores(self, answers: Sequence[Answered], tally: Tally) -> Iterator[Preferred]:
        """Make pairs of the answers to one prompt; the order of the data decides between equals."""
        ranked = sorted(answers, key=lambda answer: -(answer.score or 0.0))
        pairs = list(combinations(ranked, 2))
        if self.section.rated_pairs == "best-worst":
            pairs = [(ranked[0], ranked[-1])] if len(ranked) > 1 else []
        if not pairs:
            self._leave("alone", answers[0].row, tally)
        for better, worse in pairs:
            if better.score == worse.score:
                self._leave("ties", worse.row, tally)
            else:
                yield from self._compared(better.row, worse.row, tally)

    def _compared(self, better: Conversation, worse: Conversation, tally: Tally) -> Iterator[Preferred]:
        try:
            pair = pair_of(better, worse)
        except Unpaired as why:
            self._leave(why.reason, better, tally)
            return
        if not self.one_by_one:
            yield pair
            return
        for side, desirable in ((pair.chosen, True), (pair.rejected, False)):
            yield Judged(side, pair.shared, desirable)

    def _leave(self, reason: str, row: Conversation, tally: Tally) -> None:
        tally.counts[reason] += 1
        tally.add_problem(f"{row.origin}: a row {DROPPED[reason]} is left out.")

    def _answers(self, source: Source, tally: Tally, limit: int | None) -> Iterator[tuple[RowReader, list[Answered]]]:
        """Yield the clean answers of each row; rows without a prompt, or with an empty answer, are counted."""
        total = source.size_bytes or None
        columns = survey(tracked(source.rows(limit), "Looking at columns", total=total, size="done"))
        readers: dict[str, RowReader] = {}
        for raw in tracked(source.rows(limit), "Reading", total=total, size="done"):
            tally.counts["read"] += 1
            try:
                if raw.problem is not None:
                    raise raw.problem
                if raw.file not in readers:
                    readers[raw.file] = self._reader(raw, columns.get(raw.file, FileColumns()), tally)
                reader = readers[raw.file]
                found = reader.read(columns[raw.file].respelt(raw, reader.columns.values()))
            except DataError as error:
                if not self.tolerant or (raw.problem is None and raw.file not in readers):
                    raise
                tally.counts["broken"] += 1
                tally.add_problem(str(error))
                continue
            cleaned = [clean_row(answer.row) for answer in found]
            tally.counts["control_characters"] += any(dirty for _, dirty in cleaned)
            if any(is_empty(row) or not _answer(row) for row, _ in cleaned):
                tally.counts["empty"] += 1
                tally.add_problem(f"{raw.origin}: the prompt or an answer is empty; the row is left out.")
                continue
            yield (
                reader,
                [
                    answer._replace(row=row.with_system(self.section.system))
                    for answer, (row, _) in zip(found, cleaned, strict=True)
                ],
            )

    def _reader(self, raw: RawRow, columns: FileColumns, tally: Tally) -> RowReader:
        """Choose how the rows of a file are read, and note what will not be used of them."""
        names = columns.filled()
        try:
            reader = row_reader(self.section, names, raw.file, tally.reader)
        except DataError:  # a column that it takes may be there and blank throughout
            reader = row_reader(self.section, columns.names(), raw.file, tally.reader)
        tally.unused += columns.unused(reader.columns.values())
        tally.formats.add(reader.kind)
        return reader


def explain_nothing(path: str, counts: Counter[str]) -> str:
    """Say why no row is left."""
    if not counts["read"]:
        return f"{path!r} has no rows."
    words = {"empty": "empty", "duplicates": "duplicates", "broken": "broken", "too_long": "too long",
             "untrained": "without an answer to learn", **DROPPED}  # fmt: skip
    why = ", ".join(f"{counts[key]} {word}" for key, word in words.items() if counts[key])
    remedy = " Raise data.max_length (up to the base's context)." if counts["too_long"] else ""
    return f"{path!r} has no row to use: of {counts['read']} read, {why or 'none was kept'}.{remedy}"


def _answer(row: Conversation) -> str:
    last = row.messages[-1]
    return said(last).strip() or last.get("reasoning_content", "").strip()


def _prompt_hash(row: Conversation) -> str:
    return hash_data([replace(row, messages=row.messages[:-1]).hash])


def _digest(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()[:16]
