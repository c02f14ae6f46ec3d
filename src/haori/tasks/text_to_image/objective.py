"""Batches and losses of learning pictures.

Loss of a picture: the mean over its latent of w(t) m (e(x_t, t, c) - target)^2, where the target is the noise, the
velocity or the flow, as the base was trained; w(t) is 1 or min-SNR, m the mask, and a regularisation picture's own
weight multiplies it. The loop divides by the number of pictures of the whole optimizer step.

Noise, timestep, variant and caption of a training picture are drawn for each batch. A picture that is measured has
the same few timesteps, noise and plain variant always, so that losses of different steps, adapters and bases are
paired; they have no weights but the mask.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from haori.bases.diffusion import TimestepSampling
from haori.tasks.task import LossSum, Size
from haori.tasks.text_to_image.encoded import Encoded, variants_of

if TYPE_CHECKING:
    from haori.data.pictures import PictureRow
    from haori.tasks.text_to_image.recipe import NoiseSection

__all__ = ["Batch", "MeasuredPictures", "TrainingPictures"]


@dataclass(frozen=True)
class Group:
    """Pictures of one size in a batch; n of them.

    Attributes:
        places: Their places in the batch.
        inputs: Arguments of the model's forward: `noisy` [n, C, h, w], `timesteps` [n], and the conditions.
        target: [n, C, h, w].
        weights: [n] of the pictures' losses; 0 does not count.
        mask: [n, 1, h, w] of the latent's pixels, or None.
    """

    places: tuple[int, ...]
    inputs: dict[str, Tensor]
    target: Tensor
    weights: Tensor
    mask: Tensor | None

    def losses(self, model: torch.nn.Module) -> Tensor:
        """Return the losses [n] of the pictures, with their graph."""
        predicted: Tensor = model(**self.inputs).sample
        error = (predicted.float() - self.target).square()  # [n, C, h, w]
        if self.mask is not None:
            error = error * self.mask
        return error.flatten(1).mean(1) * self.weights

    def select(self, chosen: Sequence[int], places: Sequence[int]) -> "Group":
        """Return the pictures at these numbers within the group, which have other places then."""
        picked = list(chosen)
        return Group(
            tuple(places), {name: value[picked] for name, value in self.inputs.items()}, self.target[picked],
            self.weights[picked], None if self.mask is None else self.mask[picked],
        )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Pictures, those of the same size together.

    Attributes:
        rows: Numbers of the rows.
        groups: By size.
        cost: Pixels.
        counted: Whether the pictures count.
    """

    rows: tuple[int, ...]
    groups: tuple[Group, ...]
    cost: int
    counted: bool = True


@dataclass(frozen=True)
class _Shown:
    """A picture as it is shown to the model."""

    row: "PictureRow"
    variant: int
    caption: str
    timestep: Tensor
    noise: Tensor


class _Pictures:
    """What both kinds of pictures have in common: collating what is shown, and its losses."""

    separable = True

    def __init__(self, rows: "Sequence[PictureRow]", encoded: Encoded) -> None:
        self.rows, self.encoded = rows, encoded
        self.noising = encoded.processor.noising
        sizes = sorted({row.bucket for row in rows})
        # Pixels, with a little added to tell sizes of equal area apart: rows of like cost share a batch.
        self.costs: Sequence[int] = [row.bucket[0] * row.bucket[1] + sizes.index(row.bucket) for row in rows]

    def begin(self, model: torch.nn.Module) -> None:
        """Do nothing: what the loss needs was computed before the model was loaded."""

    def blank(self, batch: Batch) -> Batch:
        """Return the batch with nothing that counts."""
        groups = tuple(replace(group, weights=torch.zeros_like(group.weights)) for group in batch.groups)
        return replace(batch, groups=groups, counted=False)

    def size(self, batch: Batch) -> Size:
        """Return pictures and pixels."""
        return Size(len(batch.rows) if batch.counted else 0, batch.cost)

    def loss(self, model: torch.nn.Module, batch: Batch) -> LossSum:
        """Run the model on each size of pictures and sum the losses."""
        found = [(group.places, group.losses(model)) for group in batch.groups]
        each = torch.cat([losses for _, losses in found])
        places = torch.tensor([place for group, _ in found for place in group])
        total = each.sum()
        if not batch.counted:
            return LossSum(total * 0.0, 0, each.detach()[:0], places[:0])
        return LossSum(total, len(each), each.detach(), places)

    def part(self, batch: Batch, places: Sequence[int]) -> Batch:
        """Return the pictures at these places."""
        new = {place: number for number, place in enumerate(places)}
        groups = []
        for group in batch.groups:
            chosen = [number for number, place in enumerate(group.places) if place in new]
            if chosen:
                groups.append(group.select(chosen, [new[group.places[number]] for number in chosen]))
        rows = tuple(batch.rows[place] for place in places)
        return replace(batch, rows=rows, groups=tuple(groups), cost=batch.cost * len(rows) // len(batch.rows))

    def inputs(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the arguments of the model's forward for the largest group."""
        return max(batch.groups, key=lambda group: len(group.places)).inputs

    def _collate(
        self, numbers: Sequence[int], shown: Sequence[_Shown], weights: Tensor, device: torch.device | str
    ) -> Batch:
        by_size: dict[tuple[int, int], list[int]] = {}
        for place, picture in enumerate(shown):
            by_size.setdefault(picture.row.bucket, []).append(place)
        groups = [
            self._group(places, [shown[place] for place in places], weights, device) for places in by_size.values()
        ]
        cost = sum(picture.row.bucket[0] * picture.row.bucket[1] for picture in shown)
        return Batch(tuple(numbers), tuple(groups), cost)

    def _group(
        self, places: Sequence[int], shown: Sequence[_Shown], weights: Tensor, device: torch.device | str
    ) -> Group:
        encoded = self.encoded
        latents = torch.stack([encoded.latents(each.row, each.variant) for each in shown])
        noise = torch.stack([each.noise for each in shown])
        timesteps = torch.stack([each.timestep for each in shown])
        sizes = encoded.family.sizes([encoded.size(each.row, each.variant) for each in shown])
        conditions = encoded.text([each.caption for each in shown]) | sizes
        inputs = {"noisy": self.noising.add(latents, noise, timesteps), "timesteps": timesteps, **conditions}
        masks = [encoded.weights(each.row, each.variant) for each in shown]
        mask: Tensor | None = None
        if any(one is not None for one in masks):
            whole = torch.ones(1, *latents.shape[-2:])
            mask = torch.stack([whole if one is None else one for one in masks]).to(device)
        return Group(
            tuple(places),
            {name: value.to(device) for name, value in inputs.items()},
            self.noising.target(latents, noise, timesteps).to(device),
            weights[list(places)].to(device),
            mask,
        )


class TrainingPictures(_Pictures):
    """Pictures with noise, timestep, variant and caption drawn for each batch, from torch's random numbers.

    Args:
        rows: The pictures, each as often as it is repeated.
        encoded: Their latents and conditions.
        section: How noise is drawn and timesteps are weighed.
    """

    def __init__(self, rows: "Sequence[PictureRow]", encoded: Encoded, section: "NoiseSection") -> None:
        super().__init__([row for row in rows for _ in range(row.repeats)], encoded)
        self.section = section
        kind = section.timesteps
        assert kind != "auto"
        self.sampling = TimestepSampling(kind, section.logit_mean, section.logit_std, section.shift)

    def batch(self, rows: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Draw and collate."""
        timesteps = self.noising.draw(len(rows), torch.default_generator, self.sampling)
        shown = [self._draw(self.rows[row], timestep) for row, timestep in zip(rows, timesteps, strict=True)]
        weights = self.noising.weights(timesteps, self.section.min_snr_gamma)
        own = torch.tensor([each.row.weight for each in shown])
        return self._collate(rows, shown, weights * own, device)

    def _draw(self, row: "PictureRow", timestep: Tensor) -> _Shown:
        variant = _below(variants_of(row))
        captions = self.encoded.captions(row)
        caption = captions[_below(len(captions))]
        if float(torch.rand(())) < row.augmentation.caption_dropout:
            caption = ""
        latents = self.encoded.latents(row, variant)
        noise = torch.randn(latents.shape)
        if self.section.offset:
            noise = noise + self.section.offset * torch.randn(latents.shape[0], 1, 1)
        return _Shown(row, variant, caption, timestep, noise)

    def origins(self, rows: Sequence[int]) -> list[str]:
        """Return the pictures' files."""
        return [self.rows[row].origin for row in rows]


class MeasuredPictures(_Pictures):
    """Each picture at a few fixed timesteps, with fixed noise; row k T + j is picture k at the j-th of T timesteps.

    Args:
        rows: The pictures.
        encoded: Their latents and conditions.
        timesteps: How many.
        seed: Of the noise.

    Attributes:
        rows_of_each: Rows of one picture; a validation keeps the mean loss of each, to compare it with later ones.
    """

    def __init__(self, rows: "Sequence[PictureRow]", encoded: Encoded, timesteps: int, seed: int) -> None:
        super().__init__(rows, encoded)
        self.timesteps = self.noising.even(timesteps)
        self.costs = [cost for cost in self.costs for _ in range(timesteps)]
        self.rows_of_each = timesteps
        self.seed = seed

    def batch(self, rows: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Collate pictures with their noise."""
        shown = [self._fixed(*divmod(row, len(self.timesteps))) for row in rows]
        return self._collate(rows, shown, torch.ones(len(shown)), device)

    def _fixed(self, picture: int, step: int) -> _Shown:
        row = self.rows[picture]
        key = f"{self.seed} {step} {row.content_hash}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7]))
        noise = torch.randn(self.encoded.latents(row).shape, generator=generator)
        return _Shown(row, 0, self.encoded.captions(row)[0], self.timesteps[step], noise)

    def origins(self, rows: Sequence[int]) -> list[str]:
        """Return the pictures' files."""
        return [self.rows[row // len(self.timesteps)].origin for row in rows]


def _below(count: int) -> int:
    return int(torch.randint(count, ())) if count > 1 else 0
