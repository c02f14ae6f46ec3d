"""Pictures as latents and captions as embeddings, computed once before the denoiser is loaded.

Augmentation happens before the VAE, so a picture has a few variants: as it is, mirrored, with other crops or colours.
A caption has a few too, where its parts are shuffled. Training draws among them. Where text encoders are trained,
captions stay tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from haori.bases import choose_dtype, default_device
from haori.bases.diffusion import PictureSize
from haori.core.errors import DataError
from haori.core.progress_bar import progress_bar
from haori.core.settings import settings
from haori.data.pictures.captions import training_caption
from haori.data.pictures.tensors import draw_colours, draw_crop, loss_weights, mask_of, pixels
from haori.tasks.text_to_image.tensor_cache import TensorCache, key_of

if TYPE_CHECKING:
    from torch import Tensor

    from haori.bases import Base
    from haori.bases.diffusion import PipelineProcessor
    from haori.data.pictures import Colours, Crop, PictureRow

__all__ = ["Encoded", "joined", "variants_of"]

_DRAWS = 8
_BATCH_PIXELS = 1024 * 1024
_LARGE_PARAMETERS = 1e9  # of text encoders: T5-XXL has 4.7e9, and fp32 would double its memory


class _View(NamedTuple):
    """How a variant shows its picture."""

    crop: "Crop"
    mirrored: bool
    colours: "Colours | None"


def variants_of(row: "PictureRow") -> int:
    """Return in how many ways a picture is shown; the first of them is the plain one."""
    rules = row.augmentation
    return _DRAWS if rules.crop == "random" or rules.colour else 2 if rules.flip else 1


class Encoded:
    """Latents and text conditions of pictures with captions.

    Args:
        base: The pipeline.
        processor: Its tokenizers and family.
        seed: Of the variants.
        unmasked_weight: Weight of the loss where a mask is black.
        live_text: Whether captions stay tokens, for text encoders that are trained.
    """

    def __init__(
        self, base: "Base", processor: "PipelineProcessor", seed: int, *, unmasked_weight: float, live_text: bool
    ) -> None:
        self.base, self.processor, self.seed = base, processor, seed
        self.family = processor.family
        self.unmasked_weight, self.live_text = unmasked_weight, live_text
        self.cache = TensorCache(settings().cache / "pictures")
        self._masks: dict[str, Tensor] = {}
        self._vae = base.components["vae"].fingerprint.model_dump(mode="json")
        self._readers = [
            base.components[name].fingerprint.model_dump(mode="json") for name in self.family.text_encoders
        ]
        parameters = sum(base.components[name].parameters for name in self.family.text_encoders)
        small = parameters < _LARGE_PARAMETERS
        self._text_dtype = "fp32" if small else choose_dtype("auto", default_device()).name

    def captions(self, row: "PictureRow") -> list[str]:
        """Return the variants of a row's caption, the empty one of caption dropout not among them."""
        kept = replace(row, augmentation=replace(row.augmentation, caption_dropout=0.0))
        draws = _DRAWS if row.augmentation.shuffle_caption else 1
        return [training_caption(kept, self._random(row, number)) for number in range(draws)]

    def latents(self, row: "PictureRow", variant: int = 0) -> "Tensor":
        """Return the latents [C, h, w] of a variant of a row, in fp32."""
        return self.cache.get(self._latents_key(row, variant))["latents"]

    def weights(self, row: "PictureRow", variant: int = 0) -> "Tensor | None":
        """Return the weight of the loss of each latent pixel, [1, h, w]; None where nothing is masked."""
        if row.mask is None:
            return None
        key = f"{self._latents_key(row, variant)} {row.mask}"
        if key not in self._masks:
            view = self._view(row, variant)
            mask = mask_of(row, flip=view.mirrored, crop=view.crop)
            assert mask is not None
            height, width = self.latents(row, variant).shape[-2:]
            self._masks[key] = loss_weights(mask, height, width, self.unmasked_weight)
        return self._masks[key]

    def size(self, row: "PictureRow", variant: int = 0) -> PictureSize:
        """Return how the picture came to its size, for families that tell the denoiser."""
        crop, (width, height) = self._view(row, variant).crop, row.bucket
        return PictureSize((row.height, row.width), (crop.top, crop.left), (height, width))

    def text(self, captions: Sequence[str]) -> "dict[str, Tensor]":
        """Return what the model is told of captions: embeddings, or tokens where text encoders are trained."""
        if self.live_text:
            tokens = self.processor.tokens(captions)
            return {f"tokens_{name}": value for name, value in tokens.items()}
        return joined([self.cache.get(self._text_key(caption)) for caption in captions])

    def compute(self, plain: "Sequence[PictureRow]", varied: "Sequence[PictureRow]", device: str) -> None:
        """Compute what is not known yet.

        Args:
            plain: Rows that are needed as they are.
            varied: Rows that are needed in all their variants.
            device: Where the VAE and the text encoders run.

        Raises:
            DataError: A picture has no finite latents.
        """
        wanted = [(row, 0) for row in plain] + [(row, variant) for row in varied for variant in range(variants_of(row))]
        missing = {key: shown for shown in wanted if (key := self._latents_key(*shown)) not in self.cache}
        if missing:
            self._encode(missing, device)
        if not self.live_text:
            captions = {"", *(caption for row in (*plain, *varied) for caption in self.captions(row))}
            unknown = sorted(caption for caption in captions if self._text_key(caption) not in self.cache)
            if unknown:
                self._embed(unknown, device)

    def _encode(self, missing: "dict[str, tuple[PictureRow, int]]", device: str) -> None:
        import torch

        vae = self.processor.load_vae("fp32", device)
        by_size: dict[tuple[int, int], list[str]] = {}
        for key, (row, _) in missing.items():
            by_size.setdefault(row.bucket, []).append(key)
        with progress_bar("encoding pictures", len(missing), "pictures") as advance, torch.no_grad():
            for (width, height), keys in by_size.items():
                count = max(1, _BATCH_PIXELS // (width * height))
                for start in range(0, len(keys), count):
                    some = keys[start : start + count]
                    batch = torch.stack([self._pixels(*missing[key]) for key in some]).to(device)
                    for key, latents in zip(some, self.family.encode(vae, batch).float(), strict=True):
                        if not bool(torch.isfinite(latents).all()):
                            raise DataError(
                                f"The VAE of {self.base.name!r} gives values that are not finite for the picture "
                                f"{missing[key][0].origin!r}; leave the picture out, or use a VAE made for 16 bits."
                            )
                        self.cache.put(key, {"latents": latents})
                    advance(len(some))

    def _embed(self, captions: Sequence[str], device: str) -> None:
        import torch

        encoders = self.processor.load_text_encoders(self._text_dtype, device)
        with progress_bar("embedding captions", len(captions), "captions") as advance, torch.no_grad():
            for caption in captions:
                tokens = self.processor.tokens([caption])
                placed = {name: value.to(device) for name, value in tokens.items()}
                self.cache.put(self._text_key(caption), self.family.embed(encoders, placed))
                advance(1)

    def _pixels(self, row: "PictureRow", variant: int) -> "Tensor":
        view = self._view(row, variant)
        return pixels(row, flip=view.mirrored, colour=view.colours, crop=view.crop)

    def _view(self, row: "PictureRow", variant: int) -> _View:
        if not variant:
            return _View(row.crop, False, None)
        random = self._random(row, variant)
        mirrored = row.augmentation.flip and variant % 2 == 1
        return _View(draw_crop(row, random), mirrored, draw_colours(row, random))

    def _random(self, row: "PictureRow", number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number, *hashlib.sha256(row.content_hash.encode()).digest()])

    def _latents_key(self, row: "PictureRow", variant: int) -> str:
        view: Any = self._view(row, variant)
        shown = [asdict(view.crop), view.mirrored, None if view.colours is None else asdict(view.colours)]
        return key_of(kind="latents 1", picture=row.content_hash, bucket=row.bucket, shown=shown, vae=self._vae)

    def _text_key(self, caption: str) -> str:
        return key_of(
            kind="text 2", caption=caption, family=self.family.name, encoders=self._readers, dtype=self._text_dtype
        )


def joined(several: "Sequence[dict[str, Tensor]]") -> "dict[str, Tensor]":
    """Return tensors of one row each as those of a batch; shorter ones are filled with zeros behind."""
    import torch
    from torch.nn import functional

    found = {}
    for name in several[0]:
        tensors = [each[name] for each in several]
        longest = max(tensor.shape[1] if tensor.dim() > 1 else 0 for tensor in tensors)
        padded = [
            functional.pad(tensor, (*[0, 0] * (tensor.dim() - 2), 0, longest - tensor.shape[1]))
            if tensor.dim() > 1 and tensor.shape[1] < longest
            else tensor
            for tensor in tensors
        ]
        found[name] = torch.cat(padded)
    return found
