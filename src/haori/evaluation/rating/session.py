"""A session of ratings as a folder that is written whole and then only gains votes.

    session.json                    what raters may see: the question, and the pairs in order
    pairs/001.png                   both pictures side by side; -left.png and -right.png have them alone
    votes.jsonl                     a line for each vote
    key/key.json                    which is which; not for raters before they have voted
    key/drawn/1/0001.png            pictures that were drawn for the session, by system, with how they were made

Pictures of pairs are written anew, without texts that would say how they were made.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field, ValidationError

from haori.core.base_reference import Record
from haori.core.errors import FileFormatError, InputError
from haori.core.records import now
from haori.core.storage import staged_folder
from haori.evaluation.rating.pairs import Pair, PairKey, make_pairs
from haori.evaluation.rating.side_by_side import side_by_side
from haori.evaluation.rating.votes import Vote, read_votes, record_vote, standing

if TYPE_CHECKING:
    from PIL.Image import Image

    from haori.evaluation.rating.results import RatingResults

__all__ = ["RatedWork", "Session", "SessionDocument", "SessionKey", "create_session"]

_SCHEMA = 1
_MOST_NAME = 80
_R = TypeVar("_R", bound=Record)


class SessionDocument(Record):
    """session.json.

    Attributes:
        schema_version: Of this record.
        created: When, in UTC.
        question: What raters are asked.
        pairs: In the order of rating.
    """

    schema_version: int = _SCHEMA
    created: str = Field(default_factory=now)
    question: str
    pairs: tuple[Pair, ...]


class SessionKey(Record):
    """key/key.json.

    Attributes:
        schema_version: Of this record.
        systems: What each is, by its name: its tags, or its folder.
        seed: Of order and sides.
        pairs: Which system stands where.
        notes: What should be known of the pictures, a sentence each.
    """

    schema_version: int = _SCHEMA
    systems: dict[str, str]
    seed: int
    pairs: tuple[PairKey, ...]
    notes: tuple[str, ...] = ()


class RatedWork(Record):
    """What is rated.

    Attributes:
        systems: What each is, by its name.
        prompts: What was asked for, by item.
        notes: What should be known, a sentence each.
    """

    systems: dict[str, str]
    prompts: dict[str, str]
    notes: tuple[str, ...] = ()


class Session:
    """A session that was written.

    Raises:
        InputError: The folder is none.
        FileFormatError: A file of it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "session.json").is_file():
            raise InputError(
                f"{str(folder)!r} is no session of ratings: it has no session.json. Say what to rate with --system or "
                "--folder, and it is made."
            )
        self.folder = folder
        self.document = _read(folder / "session.json", SessionDocument)
        self._votes = folder / "votes.jsonl"

    def votes(self) -> list[Vote]:
        """Return all votes, those taken back included."""
        return read_votes(self._votes, (pair.id for pair in self.document.pairs))

    def waiting(self, rater: str) -> list[Pair]:
        """Return the pairs that a rater has not voted on, in order."""
        done = {vote.pair for vote in standing(self.votes()) if vote.rater == rater}
        return [pair for pair in self.document.pairs if pair.id not in done]

    def last(self, rater: str) -> Vote | None:
        """Return the rater's last vote that stands."""
        return next((vote for vote in reversed(standing(self.votes())) if vote.rater == rater), None)

    def vote(self, vote: Vote) -> None:
        """Add a vote; when this returns it is on disk."""
        record_vote(self._votes, vote)

    def picture(self, pair: Pair) -> Path:
        """Return the file with both pictures side by side."""
        return self.folder / "pairs" / f"{pair.id}.png"

    def key(self) -> SessionKey:
        """Return which is which."""
        return _read(self.folder / "key" / "key.json", SessionKey)

    def results(self) -> "RatingResults":
        """Return what the votes say."""
        from haori.evaluation.rating.results import rating_results

        key = self.key()
        return rating_results(tuple(key.systems), key.pairs, self.votes())


def create_session(
    folder: Path,
    work: RatedWork,
    pictures: "Mapping[str, Mapping[str, Image]]",
    *,
    seed: int,
    most: int | None = None,
    question: str = "Which picture is better?",
    drawn: Mapping[str, Sequence[bytes]] | None = None,
) -> Session:
    """Write a new session, whole or not at all.

    Args:
        folder: It must not exist, or be empty.
        work: Systems and prompts.
        pictures: By system and item, in RGB.
        seed: Of order and sides.
        most: Number of pairs; all if not given.
        question: What raters are asked.
        drawn: PNG files to keep under `key`, by system.

    Raises:
        InputError: The folder holds something, or there are no pairs to make.
        StorageError: It cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} exists; choose a new folder for the session.")
    for name in work.systems:
        if not name.strip() or len(name) > _MOST_NAME or not name.isprintable():
            raise InputError(
                f"A system cannot be called {name[:_MOST_NAME]!r}; give it a name of 1 to {_MOST_NAME} letters."
            )
    pairs, keys = make_pairs(tuple(work.systems), work.prompts, seed=seed, most=most)
    same = 0
    with staged_folder(folder) as stage:
        (stage / "pairs").mkdir()
        (stage / "key").mkdir()
        for pair, key in zip(pairs, keys, strict=True):
            left, right = pictures[key.left][key.item], pictures[key.right][key.item]
            same += left.size == right.size and left.tobytes() == right.tobytes()
            for side, image in (("-left", left), ("-right", right), ("", side_by_side(left, right, pair.prompt))):
                _bare(image).save(stage / "pairs" / f"{pair.id}{side}.png", format="PNG")
        notes = work.notes
        if same:
            notes += (f"In {same} of {len(pairs)} pairs both pictures are the same to the pixel.",)
        found = SessionKey(systems=work.systems, seed=seed, pairs=tuple(keys), notes=notes)
        for number, files in enumerate((drawn or {}).values(), 1):
            (stage / "key" / "drawn" / str(number)).mkdir(parents=True)
            for at, content in enumerate(files, 1):
                (stage / "key" / "drawn" / str(number) / f"{at:04d}.png").write_bytes(content)
        _write(stage / "key" / "key.json", found)
        _write(stage / "session.json", SessionDocument(question=question, pairs=tuple(pairs)))
    return Session(folder)


def _bare(image: "Image") -> "Image":
    """Return the pixels alone: what else is known of a picture might say which system made it."""
    from PIL import Image

    return Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())


def _write(path: Path, record: Record) -> None:
    path.write_text(json.dumps(record.model_dump(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path, kind: type[_R]) -> _R:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise FileFormatError(f"{str(path)!r} is damaged: {error.errors()[0]['msg']}.") from None
