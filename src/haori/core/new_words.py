"""New words of a base of pictures: what they are called, how many vectors each has, and what these begin as.

A word of several vectors is as many tokens: `<lineart>`, `<lineart>_1`, `<lineart>_2`, as diffusers names them. A
caption has the word alone; the tokenizer is given all of them.
"""

import re

from pydantic import Field

from haori.core.base_reference import Record

__all__ = ["BUNDLED", "WORD_PATTERN", "NewWord", "NewWords", "bundled_key"]

WORD_PATTERN = r"^[a-z0-9<>_*~+=#@$%&!?^-]{2,64}$"
"""CLIP's tokenizers know no capitals; the other characters mean something to programs that read prompts or files."""

BUNDLED = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""What files call the vectors of a word for each text encoder."""


class NewWord(Record):
    """A word that a base did not have."""

    word: str = Field(pattern=WORD_PATTERN, description="As it stands in captions and prompts.")
    vectors: int = Field(default=1, ge=1, description="How many vectors stand for it.")
    start: str = Field(description="The text whose embeddings the vectors began as.")

    @property
    def tokens(self) -> tuple[str, ...]:
        """Return the tokens that stand for the word."""
        return (self.word, *(f"{self.word}_{number}" for number in range(1, self.vectors)))


class NewWords(Record):
    """The new words of an adapter, with their places in the vocabulary of each text encoder."""

    words: tuple[NewWord, ...] = Field(min_length=1)
    first: dict[str, int] = Field(description="Id of the first new token, by text encoder; the others follow.")
    begins: dict[str, tuple[int, ...]] = Field(
        description="Ids of the tokens whose embeddings the vectors began as, in their order, by text encoder."
    )

    @property
    def vectors(self) -> int:
        """Return the number of vectors of all words."""
        return sum(word.vectors for word in self.words)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Return all new tokens in the order of their ids."""
        return tuple(token for word in self.words for token in word.tokens)

    def rows(self) -> dict[str, slice]:
        """Return which of all vectors are those of each word."""
        found, start = {}, 0
        for word in self.words:
            found[word.word] = slice(start, start + word.vectors)
            start += word.vectors
        return found

    def ids(self, encoder: str) -> list[int]:
        """Return the ids of all new tokens for a text encoder."""
        return [self.first[encoder] + row for row in range(self.vectors)]

    def expanded(self, caption: str) -> str:
        """Return a caption with all tokens of each word in it, as pipelines of diffusers expand a prompt."""
        for word in self.words:
            if word.vectors > 1:
                caption = caption.replace(word.word, " ".join(word.tokens))
        return caption

    def contracted(self, text: str) -> str:
        """Return an expanded text, or the end of one, with each word once."""
        for word in self.words:
            text = text.replace(" ".join(word.tokens), word.word)
            text = re.sub(rf"(?:{re.escape(word.word)}_\d+\s*)+", f"{word.word} ", text)  # cut within the word
        return text.strip()


def bundled_key(word: str, encoder: str) -> str:
    """Return the key of a word's vectors in a file, as AUTOMATIC1111 and OneTrainer read it."""
    return f"bundle_emb.{word}.{BUNDLED[encoder]}"
