"""One way through the steps: from noise, from a picture, within a mask, or over an enlarged picture.

All are done by diffusers' pipelines from text and from a picture. Inpainting is the latter with what lies outside the
mask put back after each step, as diffusers' inpainting does with UNets that read no mask; its pipeline takes bases
with 4 latent channels alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from haori.core.errors import InputError
from haori.images.request import LATENT_UPSCALERS, Hires

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from haori.bases.diffusion import Family

__all__ = ["Pass", "Steps", "first_pass", "picture_digits", "second_pass"]

_HASH_DIGITS = 12
_DOUBLE = frozenset({"Heun", "DPM2", "DPM2 a"})


class Steps(Protocol):
    """What is told of steps."""

    def begin(self) -> None:
        """Note that the first step is next."""

    def step(self, number: int, of: int, latents: "Tensor") -> None:
        """Note that a step is done."""


@dataclass(frozen=True)
class Pass:
    """The settings that pictures of one batch have in common."""

    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    schedule: str
    strength: float
    hires: Hires | None
    from_picture: bool = False

    @property
    def total_steps(self) -> int:
        """Return about how often the denoiser runs for one picture."""
        count = max(1, int(self.steps * self.strength)) if self.from_picture else self.steps
        if self.hires is not None:
            count += max(1, int((self.hires.steps or self.steps) * self.hires.strength))
        return count * (2 if self.sampler in _DOUBLE else 1)

    def settings(self, init: "Image | None", mask: "Image | None") -> dict[str, str]:
        """Return what infotext says of it beyond the common settings."""
        found: dict[str, str] = {}
        if init is not None:
            found |= {"Denoising strength": repr(self.strength), "Init image hash": picture_digits(init)}
        if mask is not None:
            found["Mask hash"] = picture_digits(mask)
        if self.hires is not None:
            found |= {"Denoising strength": repr(self.hires.strength), "Hires upscale": repr(self.hires.scale)}
            found["Hires steps"] = str(self.hires.steps or self.steps)
            found["Hires upscaler"] = self.hires.upscaler
        return found


def picture_digits(image: "Image") -> str:
    """Return the digits by which infotext knows a picture that was given."""
    head = f"{image.mode} {image.size}".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()[:_HASH_DIGITS]


def first_pass(
    pipeline: Any,
    family: "Family",
    drawing: Pass,
    call: Mapping[str, Any],
    generators: "Sequence[torch.Generator]",
    inits: "Sequence[tuple[Image | None, Image | None]]",
    steps: Steps,
) -> "list[Image] | Tensor":
    """Draw pictures from noise or from those given; latents [B, C, h, w] where a second pass enlarges those.

    Args:
        pipeline: From text, of diffusers.
        family: Of the base.
        drawing: Their settings.
        call: Further arguments of the pipeline.
        generators: One a picture.
        inits: Picture to begin from and mask, one pair a picture.
        steps: Is told of each step.
    """
    if inits[0][0] is None:
        whole = {**call, "width": drawing.width, "height": drawing.height}
        if drawing.hires is not None and drawing.hires.upscaler in LATENT_UPSCALERS:
            whole["output_type"] = "latent"
        drawn: list[Image] | Tensor = _run(pipeline, drawing.steps, whole, generators, steps)
        return drawn
    size = (drawing.width, drawing.height)
    pictures = [_sized(init, size) for init, _ in inits if init is not None]
    masks = [None if mask is None else _sized(mask, size) for _, mask in inits]
    keeper = _Keeper(pipeline, family, pictures, masks, generators) if any(masks) else None
    images = _from_pictures(pipeline, drawing.steps, drawing.strength, call, generators, pictures, steps, keeper)
    return [_within(image, picture, mask) for image, picture, mask in zip(images, pictures, masks, strict=True)]


def second_pass(
    pipeline: Any, drawing: Pass, call: Mapping[str, Any], generators: "Sequence[torch.Generator]",
    first: "Sequence[Image] | Tensor", steps: Steps,
) -> "list[Image]":  # fmt: skip
    """Enlarge what the first pass drew, and draw it anew as far as the hires fix says."""
    from PIL.Image import Resampling
    from torch import Tensor

    hires = drawing.hires
    assert hires is not None
    size = (round(drawing.width * hires.scale), round(drawing.height * hires.scale))
    count = hires.steps or drawing.steps
    if isinstance(first, Tensor):
        return _from_latents(pipeline, count, hires, size, call, generators, first, steps)
    how = Resampling.LANCZOS if hires.upscaler == "Lanczos" else Resampling.NEAREST
    large = [image.resize(size, how) for image in first]
    return _from_pictures(pipeline, count, hires.strength, call, generators, large, steps, None)


def _from_latents(
    pipeline: Any, count: int, hires: Hires, size: tuple[int, int], call: Mapping[str, Any],
    generators: "Sequence[torch.Generator]", latents: "Tensor", steps: Steps,
) -> "list[Image]":  # fmt: skip
    """Draw from enlarged latents. diffusers takes latents for pictures only where they have four channels."""
    from diffusers import AutoPipelineForImage2Image
    from diffusers.utils.torch_utils import randn_tensor
    from PIL import Image as Images
    from torch.nn.functional import interpolate

    mode, antialias = LATENT_UPSCALERS[hires.upscaler]
    target = (size[1] // pipeline.vae_scale_factor, size[0] // pipeline.vae_scale_factor)
    large = interpolate(latents, target, mode=mode, antialias=antialias)
    other = AutoPipelineForImage2Image.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)

    def prepare_latents(_image: "Tensor", timestep: "Tensor", *_: Any, **__: Any) -> "Tensor":
        noise = randn_tensor(large.shape, generator=list(generators), device=large.device, dtype=large.dtype)
        noisy: Tensor = other.scheduler.add_noise(large, noise, timestep)
        return noisy

    other.prepare_latents = prepare_latents
    shape_only = [Images.new("RGB", size)] * len(large)
    options = {**call, "image": shape_only, "strength": hires.strength}
    drawn: list[Image] = _run(other, count, options, generators, steps)
    return drawn


def _from_pictures(
    pipeline: Any, count: int, strength: float, call: Mapping[str, Any], generators: "Sequence[torch.Generator]",
    pictures: "Sequence[Image]", steps: Steps, keeper: "_Keeper | None",
) -> "list[Image]":  # fmt: skip
    from diffusers import AutoPipelineForImage2Image

    try:
        other = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError:
        raise InputError(f"A {type(pipeline).__name__} draws from text alone; leave the picture out.") from None
    other.set_progress_bar_config(disable=True)
    options = {**call, "image": list(pictures), "strength": strength}
    drawn: list[Image] = _run(other, count, options, generators, steps, keeper)
    return drawn


def _run(
    pipeline: Any, count: int, call: Mapping[str, Any], generators: "Sequence[torch.Generator]", steps: Steps,
    keeper: "_Keeper | None" = None,
) -> Any:  # fmt: skip
    """Return the pictures, a list, or what else the call's `output_type` says."""

    def on_step_end(running: Any, number: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        of = running.num_timesteps
        if keeper is not None:
            tensors["latents"] = keeper.keep(running.scheduler, number, of, tensors["latents"])
        steps.step(number, of, tensors["latents"])
        return tensors

    steps.begin()
    found = pipeline(
        **call, num_inference_steps=count, generator=list(generators), callback_on_step_end=on_step_end,
        callback_on_step_end_tensor_inputs=["latents"],
    )  # fmt: skip
    return found.images


def _sized(image: "Image", size: tuple[int, int]) -> "Image":
    from PIL.Image import Resampling

    return image if image.size == size else image.resize(size, Resampling.LANCZOS)


def _within(drawn: "Image", before: "Image", mask: "Image | None") -> "Image":
    """Return the drawn picture where the mask is white, the one before, to the byte, where it is black."""
    from PIL import Image as Images

    return drawn if mask is None else Images.composite(drawn, before, mask.convert("L"))


class _Keeper:
    """Puts what lies outside the masks back after each step, with the noise of the step that follows."""

    def __init__(
        self, pipeline: Any, family: "Family", pictures: "Sequence[Image]", masks: "Sequence[Image | None]",
        generators: "Sequence[torch.Generator]",
    ) -> None:  # fmt: skip
        import torch
        from torch.nn.functional import interpolate

        if not hasattr(pipeline, "unet"):
            raise InputError(f"Inpainting needs a base with a UNet; a {type(pipeline).__name__} has none.")
        vae = pipeline.vae
        found, noises = [], []
        for picture, generator in zip(pictures, generators, strict=True):
            own = torch.Generator("cpu")
            own.set_state(generator.get_state())  # the same numbers that the pipeline will draw
            pixels = pipeline.image_processor.preprocess(picture).to(vae.device, vae.dtype)
            with torch.no_grad():
                latents = family.encode(vae, pixels, own)
            noises.append(torch.randn(latents.shape, generator=own, dtype=latents.dtype).to(latents.device))
            found.append(latents)
        self.latents, self.noise = torch.cat(found), torch.cat(noises)
        shape = self.latents.shape[-2:]
        self.mask = torch.cat([interpolate(_white(mask, pictures[0].size), shape) for mask in masks]).to(self.latents)

    def keep(self, scheduler: Any, number: int, of: int, latents: "Tensor") -> "Tensor":
        """Return the latents after a step, within the masks as they are, elsewhere as the picture has them."""
        before = self.latents
        if number + 1 < of:
            timesteps = scheduler.timesteps[len(scheduler.timesteps) - of :]
            before = scheduler.add_noise(before, self.noise, timesteps[number + 1 : number + 2])
        return (1 - self.mask) * before + self.mask * latents


def _white(mask: "Image | None", size: tuple[int, int]) -> "Tensor":
    """Return 1 where a mask is nearer to white than to black [1, 1, H, W]; without a mask, everywhere."""
    import numpy as np
    import torch
    from PIL import Image as Images

    image = Images.new("L", size, 255) if mask is None else mask.convert("L")
    return torch.from_numpy((np.asarray(image) >= 128).astype(np.float32))[None, None]
