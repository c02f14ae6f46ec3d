"""Draws pictures with the stock pipeline of diffusers, and the adapters that prompts name on its live components.

Each picture has noise of its own, drawn on the CPU from its own seed, so that it does not depend on what else is in
its batch. Pictures whose settings are the same are drawn in one batch, whatever adapters they have.
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from math import isfinite, lcm
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.bases import Base
from haori.bases.embedded import usual_guidance
from haori.core.errors import HaoriError, InputError
from haori.images.adapters import PictureAdapter, PictureAdapters
from haori.images.infotext import Infotext, hashes_text, png_bytes
from haori.images.mixing import Mix, Mixer, Strength
from haori.images.passes import Pass, first_pass, second_pass
from haori.images.request import LATENT_UPSCALERS, PictureRequest
from haori.images.samplers import AUTOMATIC, make_scheduler, own_sampler, resolve_sampler
from haori.images.tags import AdapterTag, parse_prompt

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["DrawnPicture", "PictureGenerator", "StepsDone"]

_EMPHASIS = re.compile(r"\([^()\n]{1,80}:\s*[0-9]*\.?[0-9]+\s*\)")
_TRUE = "true_cfg_scale"
_DIFFUSERS_SIDE = 8  # the pipelines of UNets refuse other sides, whatever their autoencoder


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that was drawn.

    Attributes:
        image: In RGB.
        infotext: How it was made.
        seed: Its own.
        notes: What was left out or should be known, a sentence each.
    """

    image: "Image"
    infotext: str
    seed: int
    notes: tuple[str, ...]

    def png(self) -> bytes:
        """Return it as a PNG file."""
        return png_bytes(self.image, self.infotext)


class StepsDone(NamedTuple):
    """How far a drawing is: steps of pictures (one picture's step counts as one), and of how many."""

    done: int
    total: int


@dataclass(frozen=True)
class _Planned:
    """One picture, with everything that decides it."""

    request: PictureRequest
    drawing: Pass
    text: str
    mix: Mix
    seed: int
    notes: tuple[str, ...]
    tags: tuple[AdapterTag, ...]

    def group(self, *, mixed: bool) -> tuple[Any, ...]:
        """Return what pictures of one batch have in common."""
        request = self.request
        kind = (request.init is None, request.mask is None, request.application)
        return self.drawing, bool(request.negative), kind, () if mixed else self.tags


class PictureGenerator:
    """Draws pictures on one base; the pipeline is loaded once.

    One drawing runs at a time; others wait. Where nothing else is said, a CPU computes in fp32: many samplers keep
    latents of large size, which bf16 rounds away.

    Args:
        base: A base with a pipeline.
        adapters: Where adapters are found by name; by default the library of this machine.
        dtype: fp32, bf16, fp16 or auto.
        device: Where to draw; a GPU where there is one.
        batch: Most pictures that are drawn at once.
        mixed: Draw pictures of different adapters in one batch, on the fly; else only those of the same, merged where
            their strengths stay. Both give the same pictures up to rounding.

    Raises:
        BaseError: The base is no pipeline, or cannot be loaded.
        MissingExtraError: diffusers is not installed.
    """

    def __init__(
        self,
        base: Base,
        adapters: PictureAdapters | None = None,
        *,
        dtype: str | None = None,
        device: str | None = None,
        batch: int = 8,
        mixed: bool = False,
    ) -> None:
        from haori.bases import choose_dtype, default_device
        from haori.bases.diffusion import family_of, pipeline_of

        self.base, self.batch, self.mixed = base, batch, mixed
        self.device = device or default_device()
        self.dtype = choose_dtype(dtype or ("fp32" if self.device == "cpu" else "auto"), self.device).name
        self.family = family_of(base)
        self.pipeline: Any = pipeline_of(base, dtype=self.dtype, device=self.device)
        self._own = self.pipeline.scheduler
        guidance = signature(self.pipeline.__call__).parameters.get("guidance_scale")
        # That of Qwen-Image is for distilled bases yet to come, and has no value of its own.
        self._guided_by = "guidance_scale" if guidance and guidance.default is not None else _TRUE
        names = (self.family.denoiser, *self.family.text_encoders)
        components = {name: getattr(self.pipeline, name) for name in names}
        self.adapters = adapters or PictureAdapters(components, base)
        self._mixer = Mixer(components)
        readers = {name: getattr(self.pipeline, name.replace("text_encoder", "tokenizer")) for name in names[1:]}
        # Tokenizers are not thread-safe, and those of the pipeline may be at work on another thread.
        self._tokenizers = deepcopy(readers)
        self._lock, self._planning = threading.Lock(), threading.Lock()

    @property
    def size_multiple(self) -> int:
        """Return what both sides of a picture in pixels must divide by."""
        return lcm(self.family.size_multiple, _DIFFUSERS_SIDE)

    def check(self, requests: Sequence[PictureRequest]) -> int:
        """Return the steps of pictures that requests take, as `draw` counts them; another thread may be drawing.

        Raises:
            InputError: `draw` would refuse them.
        """
        with self._planning:
            return sum(one.drawing.total_steps for request in requests for one in self._plan(request))

    def draw(
        self, requests: Sequence[PictureRequest], on_step: Callable[[StepsDone], None] | None = None
    ) -> list[DrawnPicture]:
        """Draw the pictures of requests, in their order.

        Args:
            requests: What is asked for.
            on_step: Called after each step; an exception that it raises ends the drawing.

        Raises:
            InputError: A prompt, a setting or an adapter cannot be used.
            HaoriError: What was computed is not finite.
        """
        with self._planning:
            planned = [one for request in requests for one in self._plan(request)]
        batches = self._batches(planned)
        total = sum(len(batch) * planned[batch[0]].drawing.total_steps for batch in batches)
        drawn: dict[int, DrawnPicture] = {}
        with self._lock:
            done = 0
            for batch in batches:
                pictures = [planned[at] for at in batch]
                counter = _Counter(done, total, len(batch), on_step)
                drawn |= dict(zip(batch, self._draw_batch(pictures, counter), strict=True))
                done += len(batch) * pictures[0].drawing.total_steps
        return [drawn[at] for at in range(len(planned))]

    def _batches(self, planned: Sequence[_Planned]) -> list[list[int]]:
        """Return positions of pictures that are drawn together."""
        groups: dict[Any, list[int]] = {}
        for at, one in enumerate(planned):
            groups.setdefault(one.group(mixed=self.mixed), []).append(at)
        return [group[at : at + self.batch] for group in groups.values() for at in range(0, len(group), self.batch)]

    def _plan(self, request: PictureRequest) -> Iterator[_Planned]:
        read = parse_prompt(request.prompt, lenient=request.lenient)
        notes = list(read.notes)
        mix = tuple(strength for tag in read.tags if (strength := self._strength(tag, request, notes)))
        for what, text in (("prompt", read.text), ("negative prompt", request.negative)):
            self._check_length(what, text, request, notes)
        if emphasis := _EMPHASIS.search(read.text):
            notes.append(f"Emphasis such as {emphasis[0]!r} is not read; it was drawn as text.")
        drawing = self._pass(request)
        for number in range(request.count):
            yield _Planned(request, drawing, read.text, mix, request.seed + number, tuple(notes), read.tags)

    def _strength(self, tag: AdapterTag, request: PictureRequest, notes: list[str]) -> Strength | None:
        try:
            adapter: PictureAdapter = self.adapters.get(tag.name)
        except InputError as error:
            if not request.lenient:
                raise
            notes.append(f"{error} The adapter {tag.name!r} was left out.")
            return None
        notes.extend(adapter.notes)
        if tag.schedule is None:
            return Strength(adapter, tag.unet, tag.text_encoder)
        return Strength(adapter, 1.0, tag.text_encoder, tag.schedule.at)

    def _check_length(self, what: str, text: str, request: PictureRequest, notes: list[str]) -> None:
        if not (cut := self.family.cut(self._tokenizers, text)):
            return
        sentence = f"The {what} is longer than the base reads: {cut[:80]!r} lies beyond its end."
        if not request.lenient:
            raise InputError(f"{sentence} Shorten it, or let --lenient draw without that.")
        notes.append(f"{sentence} It was not read.")

    def _pass(self, request: PictureRequest) -> Pass:
        width, height = request.size(self.family.native_size, self.size_multiple)
        taken = signature(self.pipeline.__call__).parameters
        if request.negative and ("negative_prompt" not in taken or (_TRUE in taken and self._guided_by != _TRUE)):
            raise InputError(f"The base {self.base.name!r} reads no negative prompt; leave it out.")
        guidance = request.guidance if request.guidance is not None else usual_guidance(self.base.source)
        if guidance is None:
            guidance = float(taken[self._guided_by].default)
        if request.sampler is None:
            sampler, schedule = own_sampler(self._own), AUTOMATIC
        else:
            sampler, schedule = resolve_sampler(request.sampler, request.schedule)
        make_scheduler(self._own, sampler, schedule, request.steps)
        if request.hires is not None and request.hires.upscaler in LATENT_UPSCALERS:
            self._check_latents(request)
        return Pass(
            width,
            height,
            request.steps,
            guidance,
            sampler,
            schedule,
            request.strength,
            request.hires,
            request.init is not None,
        )

    def _check_latents(self, request: PictureRequest) -> None:
        assert request.hires is not None
        if hasattr(self.pipeline, "unet") and request.init is None:
            return
        why = "a base with a UNet" if request.init is None else "a first pass from noise"
        raise InputError(f"The upscaler {request.hires.upscaler!r} needs {why}; take Lanczos or Nearest.")

    def _draw_batch(self, pictures: Sequence[_Planned], counter: "_Counter") -> list[DrawnPicture]:
        from haori.bases.quiet import quiet_diffusers

        mixes = [one.mix for one in pictures]
        asked = pictures[0].request.application
        way = self._mixer.choose(mixes) if asked == "auto" else asked
        with self._mixed(way, mixes) as scale, quiet_diffusers():
            counter.scale = scale
            images = self._images(pictures, counter)
        return [
            DrawnPicture(image, self._infotext(one, way, at, len(pictures)), one.seed, one.notes)
            for at, (one, image) in enumerate(zip(pictures, images, strict=True))
        ]

    @contextmanager
    def _mixed(self, way: str, mixes: Sequence[Mix]) -> Iterator[Callable[[float], None]]:
        """Put mixes on; yield what is to be called with the share of the steps before each."""
        if way == "merged":
            with self._mixer.merged(mixes[0]):
                yield lambda _share: None
        else:
            with self._mixer.on_the_fly(mixes) as rows:
                yield rows.scale

    def _images(self, pictures: Sequence[_Planned], counter: "_Counter") -> "list[Image]":
        drawing, request = pictures[0].drawing, pictures[0].request
        prompts = [one.text for one in pictures]
        negatives = [one.request.negative for one in pictures] if request.negative else None
        generators = _generators(pictures)
        inits = [(one.request.init, one.request.mask) for one in pictures]
        call = {"prompt": prompts, self._guided_by: drawing.guidance}
        call |= {"negative_prompt": negatives} if negatives else {}
        self.pipeline.scheduler = make_scheduler(self._own, drawing.sampler, drawing.schedule, drawing.steps)
        try:
            first = first_pass(self.pipeline, self.family, drawing, call, generators, inits, counter)
            if drawing.hires is None:
                assert isinstance(first, list)
                images = first
            else:
                self.pipeline.scheduler = make_scheduler(
                    self._own, drawing.sampler, drawing.schedule, drawing.hires.steps or drawing.steps
                )
                images = second_pass(self.pipeline, drawing, call, _generators(pictures), first, counter)
        finally:
            self.pipeline.scheduler = self._own
        return images

    def _infotext(self, one: _Planned, way: str, place: int, of: int) -> str:
        drawing = one.drawing
        settings = {
            "Steps": str(drawing.steps),
            "Sampler": drawing.sampler,
            "Schedule type": drawing.schedule,
            "CFG scale": _plain(drawing.guidance),
            "Seed": str(one.seed),
            "Size": f"{drawing.width}x{drawing.height}",
            "Model hash": self.base.id[:10],
            "Model": self.base.name,
            **drawing.settings(one.request.init, one.request.mask),
        }
        if of > 1:
            # The last bits of what is computed depend on them.
            settings |= {"Batch size": str(of), "Batch pos": str(place)}
        adapters = {strength.adapter.name: strength.adapter.short_hash for strength in one.mix}
        if adapters:
            settings["Lora hashes"] = hashes_text(adapters)
        if way == "on_the_fly" and one.mix:
            settings["Lora application"] = "on the fly"
        if self.dtype != "fp32":
            settings["Dtype"] = self.dtype
        settings["Version"] = "haori"
        return Infotext(one.request.prompt, one.request.negative, settings).text()


class _Counter:
    """Counts steps, sets the strengths of the next one, and looks at the last one's result."""

    def __init__(self, done: int, total: int, pictures: int, on_step: Callable[[StepsDone], None] | None) -> None:
        self._done, self._total, self._pictures, self._on_step = done, total, pictures, on_step
        self.scale: Callable[[float], None] = lambda _share: None

    def begin(self) -> None:
        """Set the strengths of the first step."""
        self.scale(0.0)

    def step(self, number: int, of: int, latents: "torch.Tensor") -> None:
        """Take note of step `number` (from 0) of so many."""
        if number + 1 == of and not isfinite(float(latents.float().abs().max())):
            raise HaoriError(
                "What the base computed is not finite, so there is no picture; choose another sampler or number of "
                "steps, a lower guidance or strength, or --dtype fp32."
            )
        self.scale((number + 1) / max(1, of - 1))
        # Some samplers take two steps of the model for one of theirs.
        self._done += self._pictures
        if self._on_step:
            self._on_step(StepsDone(min(self._done, self._total), self._total))


def _generators(pictures: Sequence[_Planned]) -> "list[torch.Generator]":
    import torch

    return [torch.Generator("cpu").manual_seed(one.seed) for one in pictures]


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else repr(number)
