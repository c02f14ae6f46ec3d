"""What turns captions and pictures into the inputs of an image base: tokenizers, autoencoder, text encoders.

Tokenizers and configurations are read at once; the models with weights only when they are asked for, so that what a
cache holds costs no memory.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haori.bases.base import Base
from haori.bases.diffusion.components import class_of, load_component
from haori.bases.diffusion.configs import read_configs
from haori.bases.diffusion.extra import require_diffusers
from haori.bases.diffusion.families import family_of
from haori.bases.diffusion.noising import Noising, noising_of
from haori.bases.dtype import choose_dtype, default_device, torch_dtype
from haori.bases.load_errors import first_line
from haori.bases.quiet import quiet_diffusers
from haori.core.errors import BaseError
from haori.core.new_words import NewWord, NewWords

if TYPE_CHECKING:
    from torch import Tensor, nn

    from haori.bases.diffusion.family import Family

__all__ = ["PipelineProcessor"]


class PipelineProcessor:
    """Tokenizers of a base by component, its family and noising.

    Args:
        base: A base with a pipeline.
        words: New words to give to the tokenizers.

    Raises:
        BaseError: It is no pipeline of a known family, or a tokenizer is missing or damaged.
        InputError: A new word cannot be added.
        MissingExtraError: diffusers is not installed.
    """

    def __init__(self, base: Base, words: Sequence[NewWord] = ()) -> None:
        require_diffusers()
        self.base = base
        self._configs = read_configs(base)
        self.family: Family = family_of(base)
        self.noising: Noising = noising_of(self._configs.part("scheduler").config)
        self.tokenizers: dict[str, Any] = {name: self._tokenizer(name) for name in self.family.text_encoders}
        self.words = self._place(words)

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """Return a text as the first text encoder's tokenizer reads it; trainable tokens are found so."""
        return next(iter(self.tokenizers.values()))(text, add_special_tokens=add_special_tokens)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return tokens of the first text encoder by their ids, as a recipe names trainable ones."""
        return list(next(iter(self.tokenizers.values())).convert_ids_to_tokens(list(ids)))

    @property
    def native_size(self) -> int:
        """Return the side in pixels of the square pictures that the base was made for."""
        return self.family.native_size

    @property
    def size_multiple(self) -> int:
        """Return what both sides of a picture must divide by."""
        return self.family.size_multiple

    def tokens(self, captions: Sequence[str]) -> "dict[str, Tensor]":
        """Return captions as token ids [B, T] for each text encoder; see `Family.tokens`."""
        given = captions if self.words is None else [self.words.expanded(caption) for caption in captions]
        return self.family.tokens(self.tokenizers, given)

    def cut(self, caption: str) -> str:
        """Return what of a caption no text encoder reads; see `Family.cut`."""
        if self.words is None:
            return self.family.cut(self.tokenizers, caption)
        return self.words.contracted(self.family.cut(self.tokenizers, self.words.expanded(caption)))

    def tokenizer_parts(self) -> "dict[str, Any]":
        """Return the tokenizers by what the pipeline of diffusers calls them."""
        return {name.replace("text_encoder", "tokenizer"): found for name, found in self.tokenizers.items()}

    def load_vae(self, dtype: str = "auto", device: str | None = None) -> "nn.Module":
        """Load the autoencoder; in fp32 instead of fp16 where its configuration says that fp16 overflows.

        Raises:
            BaseError: It is missing or cannot be loaded.
        """
        at = device or default_device()
        name = choose_dtype(dtype, at).name
        if name == "fp16" and self._configs.part("vae").config.get("force_upcast"):
            name = "fp32"
        return load_component(self.base, "vae", dtype=torch_dtype(name), device=at, configs=self._configs)

    def load_text_encoders(
        self, dtype: str = "auto", device: str | None = None, names: Sequence[str] | None = None
    ) -> "dict[str, nn.Module]":
        """Load text encoders by name, all by default.

        Raises:
            BaseError: One is missing or cannot be loaded.
        """
        at = device or default_device()
        number_format = torch_dtype(choose_dtype(dtype, at).name)
        return {
            name: load_component(self.base, name, dtype=number_format, device=at, configs=self._configs)
            for name in self.family.text_encoders
            if names is None or name in names
        }

    def _place(self, words: Sequence[NewWord]) -> NewWords | None:
        if not words:
            return None
        from haori.bases.diffusion.new_words import check_reads_words, place_words

        check_reads_words(self.base, self.family.text_encoders)
        return place_words(words, self.tokenizers)

    def _tokenizer(self, encoder: str) -> Any:
        part = self._configs.part(encoder.replace("text_encoder", "tokenizer"))
        kind: Any = class_of(self.base, part)
        try:
            with quiet_diffusers():
                found = kind.from_pretrained(part.path, local_files_only=True)
        except Exception as error:
            # tokenizers raises bare Exception for a damaged tokenizer.json.
            raise BaseError(
                f"The tokenizer {part.path.name!r} of {self.base.name!r} cannot be loaded: {first_line(error)}."
            ) from error
        # Some tokenizers say that they have no limit; what the encoder has positions for is one.
        positions = self._configs.part(encoder).config.get("max_position_embeddings")
        if isinstance(positions, int) and found.model_max_length > positions:
            found.model_max_length = positions
        return found
