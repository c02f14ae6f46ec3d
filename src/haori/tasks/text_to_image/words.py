"""New words of a recipe: what they begin as, and which captions hold them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.core.errors import RecipeError
from haori.core.methods import FullMethod
from haori.core.new_words import NewWord
from haori.data.pictures import full_caption
from haori.data.pictures.captions import holds

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.data.pictures import PictureRow, PictureSplit
    from haori.tasks.text_to_image.recipe import TextToImageRecipe, WordSection

__all__ = ["check_captions", "check_words", "new_words", "telling_rows"]


def new_words(recipe: "TextToImageRecipe") -> tuple[NewWord, ...]:
    """Return the new words with what each begins as."""
    return tuple(
        NewWord(
            word=section.word,
            vectors=section.vectors,
            start=_letters(section.word) if section.start == "auto" else section.start,
        )
        for section in recipe.words
    )


def check_words(recipe: "TextToImageRecipe", base: "Base", encoders: Sequence[str]) -> None:
    """Refuse new words for a base that cannot read them, and a rate for words where there are none.

    Raises:
        RecipeError: Keys do not go together.
        BaseError: A text encoder is none of CLIP.
    """
    from haori.bases.diffusion import check_reads_words

    if not recipe.words:
        if recipe.optimizer.word_lr != "auto":
            raise RecipeError("'optimizer.word_lr' is the rate of new words, and 'words' has none; leave it out.")
        return
    if isinstance(recipe.method, FullMethod):
        raise RecipeError(
            "'words' is for adapters, which keep new words in their file; with method.kind=full leave it out, and name "
            "what is learnt with data.trigger."
        )
    if recipe.from_ is not None:
        raise RecipeError("'words' begins new words, and 'from' goes on from an adapter; leave one of them out.")
    if len({section.word for section in recipe.words}) < len(recipe.words):
        raise RecipeError("'words' names a word twice; give each once, with its number of vectors.")
    check_reads_words(base, encoders)


def check_captions(words: "Sequence[WordSection]", split: "PictureSplit") -> None:
    """Refuse a new word that no caption of a training picture holds, for it would learn nothing.

    Raises:
        RecipeError: There is one.
    """
    for section in words:
        if not telling_rows([row for row in split.train if not row.prior], (section,), 1, others=False):
            raise RecipeError(
                f"The new word {section.word!r} is in no caption of the training pictures, so it would learn nothing; "
                f"write it into them, or put it before each with data.trigger={section.word!r}."
            )


def telling_rows(
    rows: "Sequence[PictureRow]", words: "Sequence[WordSection]", count: int, *, others: bool = True
) -> "list[PictureRow]":
    """Return the first row whose caption holds each word, and then others up to a count.

    Args:
        rows: In order.
        words: New words.
        count: How many rows; where there are more words, one for each of them.
        others: Whether rows without any of the words may make up the number.
    """
    captions = [full_caption(row.caption, row.augmentation) for row in rows]
    first = [
        next((at for at, caption in enumerate(captions) if holds(caption, section.word)), None) for section in words
    ]
    places = list(dict.fromkeys(at for at in first if at is not None))
    rest = [at for at in range(len(rows)) if at not in places] if others else []
    return [rows[at] for at in [*places, *rest][: max(count, len(places))]]


def _letters(word: str) -> str:
    """Return the letters and figures of a word, with spaces for what stands between them."""
    return " ".join("".join(letter if letter.isalnum() else " " for letter in word).split()) or word
