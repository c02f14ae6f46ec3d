"""What is asked for: one prompt, and everything that decides the pictures made from it.

A request is checked when it is made, as far as that needs no base, so that nothing is loaded for one that cannot be
drawn. Requests are written into infotext and read from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Literal

from haori.core.errors import FileFormatError, InputError
from haori.images.infotext import Infotext, adapter_hashes
from haori.images.samplers import AUTOMATIC, resolve_sampler
from haori.images.tags import MAX_PROMPT

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LATENT_UPSCALERS", "UPSCALERS", "Application", "Hires", "PictureRequest", "Recorded", "recorded_request"]

LATENT_UPSCALERS: Mapping[str, tuple[str, bool]] = {
    "Latent": ("bilinear", False),
    "Latent (antialiased)": ("bilinear", True),
    "Latent (bicubic)": ("bicubic", False),
    "Latent (bicubic antialiased)": ("bicubic", True),
    "Latent (nearest)": ("nearest", False),
    "Latent (nearest-exact)": ("nearest-exact", False),
}
"""A1111's names of what enlarges the latents, with the mode of `torch.nn.functional.interpolate`, and antialiasing."""
UPSCALERS = ("Lanczos", "Nearest", *LATENT_UPSCALERS)
Application = Literal["auto", "merged", "on_the_fly"]
_MOST_STEPS = 500
_MOST_PICTURES = 1_000
_MOST_PIXELS = 1 << 24
_MOST_GUIDANCE = 100.0
_LARGEST_SEED = (1 << 53) - 1  # whole in JSON too


@dataclass(frozen=True)
class Hires:
    """A second pass over the enlarged picture (hires fix).

    Attributes:
        scale: Sides of the second pass by those of the first.
        steps: Of the second pass; None for those of the first.
        strength: How much of the first picture is drawn anew, above 0 to 1.
        upscaler: One of `UPSCALERS`.
    """

    scale: float = 2.0
    steps: int | None = None
    strength: float = 0.7
    upscaler: str = "Lanczos"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: One is out of its range.
        """
        _check("scale of the hires fix", self.scale, 1.0, 8.0)
        _check("strength of the hires fix", self.strength, 0.01, 1.0)
        if self.steps is not None:
            _check("number of steps of the hires fix", self.steps, 1, _MOST_STEPS)
        if self.upscaler not in UPSCALERS:
            raise InputError(f"There is no upscaler {self.upscaler[:80]!r}; there are {', '.join(UPSCALERS)}.")


@dataclass(frozen=True)
class PictureRequest:
    """One prompt, and how it is drawn.

    Attributes:
        prompt: With tags of adapters.
        negative: What the pictures should not show; its tags are not read.
        seed: Of the first picture; the others have those that follow.
        count: Number of pictures.
        steps: Of the sampler.
        guidance: Strength of the prompt (CFG scale); None for the base's own, or else the pipeline's.
        width: In pixels; None for the base's own, or that of `init`.
        height: In pixels, likewise.
        sampler: By the web UI's name; None for the base's own.
        schedule: Schedule type by the web UI's name.
        init: Picture to begin from (img2img), in RGB.
        mask: Where `init` is drawn anew (inpainting), white for all of it; of its size, in L.
        strength: How much of `init` is drawn anew, above 0 to 1.
        hires: A second pass over the enlarged picture.
        lenient: Leave out what cannot be used, with a note on the picture.
        application: How adapters are put on; `auto` takes what takes less time.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    count: int = 1
    steps: int = 25
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    schedule: str = AUTOMATIC
    init: "Image | None" = None
    mask: "Image | None" = None
    strength: float = 0.75
    hires: Hires | None = None
    lenient: bool = False
    application: Application = "auto"

    def __post_init__(self) -> None:
        """Check what needs no base.

        Raises:
            InputError: Something is out of its range, or does not go together.
        """
        for what, text in (("prompt", self.prompt), ("negative prompt", self.negative)):
            if len(text) > MAX_PROMPT:
                raise InputError(f"The {what} has {len(text):,} characters; it may have {MAX_PROMPT:,}.")
            if any((ord(letter) < 32 and letter not in "\n\t") or 0xD800 <= ord(letter) < 0xE000 for letter in text):
                raise InputError(f"The {what} has control characters or halves of characters in it; take them out.")
        _check("seed", self.seed, 0, _LARGEST_SEED - self.count)
        _check("number of pictures", self.count, 1, _MOST_PICTURES)
        _check("number of steps", self.steps, 1, _MOST_STEPS)
        if self.guidance is not None:
            _check("guidance", self.guidance, 0.0, _MOST_GUIDANCE)
        if self.sampler is not None:
            resolve_sampler(self.sampler, self.schedule)
        elif self.schedule != AUTOMATIC:
            raise InputError(f"The schedule type {self.schedule[:80]!r} needs a sampler beside it.")
        self._check_pictures()

    def _check_pictures(self) -> None:
        if (self.width is None) != (self.height is None):
            raise InputError("Give both width and height, or neither.")
        _check("strength", self.strength, 0.01, 1.0)
        if self.init is None and self.mask is not None:
            raise InputError("A mask says which part of a picture is drawn anew; give that picture too.")
        if self.init is not None and self.mask is not None and self.mask.size != self.init.size:
            raise InputError(
                f"The mask has {_size(self.mask.size)} pixels and the picture {_size(self.init.size)}; give a mask of "
                "the picture's size."
            )
        if self.init is not None and int(self.steps * self.strength) < 1:
            raise InputError(
                f"A strength of {self.strength:g} leaves none of {self.steps} steps to draw; raise one of them."
            )

    def size(self, native: int, multiple: int) -> tuple[int, int]:
        """Return width and height in pixels.

        Args:
            native: Side of the pictures that the base was made for.
            multiple: What both sides must divide by.

        Raises:
            InputError: They are too large or do not divide.
        """
        found = (native, native) if self.init is None else self.init.size
        if self.width is not None and self.height is not None:
            found = (self.width, self.height)
        factor = 1.0 if self.hires is None else self.hires.scale
        for width, height in (found, (round(found[0] * factor), round(found[1] * factor))):
            if width < multiple or height < multiple or width % multiple or height % multiple:
                near = _size((_nearest(width, multiple), _nearest(height, multiple)))
                raise InputError(
                    f"A picture cannot have {_size((width, height))} pixels: this base takes sides that divide by "
                    f"{multiple}; the nearest size is {near}."
                )
            if width * height > _MOST_PIXELS:
                raise InputError(
                    f"A picture of {_size((width, height))} pixels is too large; {_MOST_PIXELS >> 20} million are most."
                )
        return found


def _check(what: str, value: float, low: float, high: float) -> None:
    if not isfinite(value) or not low <= value <= high:
        raise InputError(f"The {what} is {value:,}; it must be between {low:g} and {high:,}.")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]:,} x {size[1]:,}"


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


@dataclass(frozen=True)
class Recorded:
    """A request as a picture's infotext tells it, and what it must be drawn with to be the same.

    Attributes:
        request: For that one picture; pictures that it began from are not in it.
        model: The base's name; None if it is not told.
        model_hash: Digits of the base's hash.
        hashes: Digits of the adapters' hashes by name.
        dtype: In which the base computed.
        init_hash: Digits of the hash of the picture that it began from, if it did.
        mask_hash: Digits of the hash of the mask.
        batch: Number of pictures of the batch that it was drawn in, and its place among them from 0.
        notes: What of the infotext was not used, a sentence each.
    """

    request: PictureRequest
    model: str | None
    model_hash: str | None
    hashes: Mapping[str, str]
    dtype: str | None
    init_hash: str | None
    mask_hash: str | None
    batch: tuple[int, int] = (1, 0)
    notes: tuple[str, ...] = ()


_READ = {
    "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model", "Denoising strength",
    "Hires upscale", "Hires steps", "Hires upscaler", "Init image hash", "Mask hash", "Lora hashes",
    "Lora application", "Dtype", "Batch size", "Batch pos", "Version",
}  # fmt: skip


def recorded_request(info: Infotext, *, lenient: bool = False) -> Recorded:
    """Return what an infotext asks for.

    Args:
        info: As it was read.
        lenient: Pass over settings that mean nothing here, with a note.

    Raises:
        FileFormatError: A value is no number, or (unless lenient) a setting is not known.
        InputError: A value is out of its range.
    """
    settings = dict(info.settings)
    unknown = [name for name in settings if name not in _READ]
    if unknown and not lenient:
        raise FileFormatError(
            f"The infotext sets {unknown[0]!r}, which has no meaning here, so that the picture would be another; "
            "--lenient draws it without."
        )
    width, height = _read_size(settings.get("Size"))
    hires = None
    if "Hires upscale" in settings:
        hires = Hires(
            _number(settings, "Hires upscale", 2.0),
            int(_number(settings, "Hires steps", 0)) or None,
            _number(settings, "Denoising strength", 0.7),
            settings.get("Hires upscaler", "Lanczos"),
        )
    guided = "CFG scale" in settings
    batch = (int(_number(settings, "Batch size", 1)), int(_number(settings, "Batch pos", 0)))
    if not 0 <= batch[1] < batch[0] <= _MOST_PICTURES:
        raise FileFormatError(f"The infotext says that the picture is number {batch[1]:,} of {batch[0]:,}.")
    request = PictureRequest(
        prompt=info.prompt,
        negative=info.negative,
        seed=int(_number(settings, "Seed", 0)),
        steps=int(_number(settings, "Steps", 0)),
        guidance=_number(settings, "CFG scale", 0.0) if guided else None,
        width=width,
        height=height,
        sampler=settings.get("Sampler"),
        schedule=settings.get("Schedule type", AUTOMATIC),
        strength=_number(settings, "Denoising strength", 0.75) if hires is None else 0.75,
        hires=hires,
        lenient=lenient,
        application="on_the_fly" if settings.get("Lora application") == "on the fly" else "auto",
    )
    return Recorded(
        request, settings.get("Model"), settings.get("Model hash"), adapter_hashes(settings.get("Lora hashes", "")),
        settings.get("Dtype"), settings.get("Init image hash"), settings.get("Mask hash"), batch,
        tuple(f"The infotext sets {name!r}, which was not used." for name in unknown),
    )  # fmt: skip


def _number(settings: Mapping[str, str], name: str, default: float) -> float:
    text = settings.get(name)
    try:
        # A seed is whole and may have more digits than a float holds.
        found = default if text is None else int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        raise FileFormatError(f"The infotext says {name!r} is {str(text)[:60]!r}, which is no number.") from None
    if not isfinite(found):
        raise FileFormatError(f"The infotext says {name!r} is {str(text)[:60]!r}; only finite numbers can be used.")
    return found


def _read_size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    width, _, height = text.partition("x")
    if not (width.isascii() and width.isdecimal() and height.isascii() and height.isdecimal() and len(text) < 20):
        raise FileFormatError(f"The infotext says 'Size' is {text[:60]!r}; expected width and height as in 512x768.")
    return int(width), int(height)
