"""New words for a pipeline: chosen and checked against its tokenizers, and put into its text encoders.

Textual inversion (Gal et al. 2022, arXiv 2208.01618); with LoRA beside it it is called pivotal tuning. The embedding of
each CLIP text encoder gets rows for the new tokens in a module of their own, in fp32. The rows it had stay as they are,
whatever is trained.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from haori.core.errors import BaseError, InputError
from haori.core.new_words import BUNDLED, NewWord, NewWords

if TYPE_CHECKING:
    from haori.bases.base import Base
    from haori.bases.diffusion.model import DiffusionModel

__all__ = ["WORD_ROWS", "WordEmbedding", "WordRows", "check_reads_words", "place_words", "put_words", "word_modules"]

WORD_ROWS = "token_embedding.words"
"""End of the name of the module that holds the rows of new words."""

_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
_LEGACY_END = 2  # in configurations before transformers 4.31; the pooled state is then that of the largest id


class WordRows(nn.Module):
    """The rows of new words alone.

    Args:
        weight: [V, D] for V vectors, in fp32.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, places: Tensor) -> Tensor:
        """Return the rows [B, T, D] at places [B, T] from 0."""
        return nn.functional.embedding(places, self.weight)


class WordEmbedding(nn.Module):
    """An embedding with rows for new words behind its own.

    Args:
        tokens: The base's embedding.
        words: The rows.
        first: Id of the first new token.
    """

    def __init__(self, tokens: nn.Module, words: WordRows, first: int) -> None:
        super().__init__()
        self.tokens, self.words, self.first = tokens, words, first

    @property
    def weight(self) -> Tensor:
        """Return the base's rows."""
        return cast(Tensor, self.tokens.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Return embeddings [B, T, D] of ids [B, T] in the dtype of the base's."""
        is_word = ids >= self.first
        found: Tensor = self.tokens(ids.masked_fill(is_word, 0))
        rows: Tensor = self.words((ids - self.first).clamp_min(0))
        return torch.where(is_word[..., None], rows.to(found.dtype), found)


def check_reads_words(base: "Base", encoders: Sequence[str]) -> None:
    """Refuse a base of which a text encoder is none of CLIP.

    Raises:
        BaseError: One is not.
    """
    kinds = {name: base.components[name].fingerprint.architecture for name in encoders}
    for name, kind in kinds.items():
        if kind not in _CLIP or name not in BUNDLED:
            raise BaseError(
                f"New words are for bases that read captions with CLIP alone (Stable Diffusion 1, 2 and XL), and the "
                f"{name!r} of {base.name!r} is a {kind}; leave 'words' out, and name what is learnt with data.trigger."
            )


def place_words(words: Sequence[NewWord], tokenizers: Mapping[str, Any]) -> NewWords:
    """Add words to tokenizers, and return their places.

    Args:
        words: The words.
        tokenizers: By text encoder; they are changed.

    Raises:
        InputError: A word is in a vocabulary already, holds another one, begins as nothing, or has more vectors than a
            caption has room for.
    """
    _check_apart(words)
    first, begins = {}, {}
    for encoder, tokenizer in tokenizers.items():
        for word in words:
            _check_new(word, tokenizer)
        first[encoder] = len(tokenizer)
        begins[encoder] = tuple(token for word in words for token in _begin(word, tokenizer))
    placed = NewWords(words=tuple(words), first=first, begins=begins)
    for encoder, tokenizer in tokenizers.items():
        tokenizer.add_tokens(list(placed.tokens))
        if tokenizer.convert_tokens_to_ids(list(placed.tokens)) != placed.ids(encoder):
            raise InputError(f"The tokenizer of {encoder!r} cannot be given the words {', '.join(placed.tokens)}.")
    return placed


def put_words(model: "DiffusionModel", words: NewWords) -> None:
    """Give the text encoders of a model rows for new words, which begin as the embeddings of other tokens.

    With the words in it a text encoder pools at the end of the text; where its configuration is of before transformers
    4.31 it would pool at the token with the largest id, which is a new word then.

    Args:
        model: With its text encoders; one that has these words already is left as it is.
        words: The words.

    Raises:
        InputError: A text encoder is not loaded, or the model has other new words.
    """
    if model.new_words is not None:
        if model.new_words != words:
            raise InputError(f"The model has the new words {', '.join(model.new_words.tokens)} already, not others.")
        return
    encoders = model.text_encoders
    if lacking := sorted(words.first.keys() - encoders.keys()):
        raise InputError(f"New words need the text encoder {lacking[0]!r}, which is not loaded.")
    for name, first in words.first.items():
        encoder: Any = encoders[name]
        tokens: Any = encoder.get_input_embeddings()
        weight: Tensor = tokens.weight
        rows = weight.detach()[list(words.begins[name])].float().clone()
        embedding = WordEmbedding(tokens, WordRows(rows), first)
        encoder.set_input_embeddings(embedding.train(tokens.training))
        for module in encoder.modules():
            if getattr(module, "eos_token_id", None) == _LEGACY_END:
                module.eos_token_id = encoder.config.vocab_size - 1  # CLIP's end token is the last
    model.new_words = words


def word_modules(model: nn.Module) -> list[str]:
    """Return the full names of the modules that hold the rows of new words."""
    return [name for name, module in model.named_modules() if isinstance(module, WordRows)]


def _check_apart(words: Sequence[NewWord]) -> None:
    for word in words:
        for other in words:
            if word is not other and any(word.word in token for token in other.tokens):
                raise InputError(f"The new word {word.word!r} is a part of {other.word!r}; name them apart.")


def _check_new(word: NewWord, tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    for token in word.tokens:
        if token in vocabulary or f"{token}</w>" in vocabulary:
            raise InputError(
                f"{token!r} is a word that the base has; give a new one, such as '<{token.strip('<>')}>' or another "
                "name, or leave 'words' out and use it as data.trigger."
            )
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    if word.vectors > room // 2:
        raise InputError(
            f"The new word {word.word!r} has {word.vectors} vectors, and a caption has {room} tokens; give at most "
            f"{room // 2}."
        )


def _begin(word: NewWord, tokenizer: Any) -> list[int]:
    """Return the tokens that a word's vectors begin as: those of its start, spread over them as AUTOMATIC1111 does."""
    found = tokenizer(word.start, add_special_tokens=False, verbose=False)["input_ids"]
    if not found:
        raise InputError(f"The new word {word.word!r} begins as {word.start!r}, which is no token; give a text.")
    return [int(found[row * len(found) // word.vectors]) for row in range(word.vectors)]
