"""Adapters named in a prompt, in the grammar of AUTOMATIC1111's web UI, read strictly.

    <lora:NAME:TEXT_ENCODER:UNET>     <lora:NAME:te=0.5:unet=0.8>     <lora:NAME:0@0,0.8@0.5>

An argument with exactly one `=` is named, the others are name, strength on the text encoders (1) and strength on the
denoiser (that of the text encoders), in this order; `lyco` is another word for `lora`. A tag is taken out of the prompt
and the spaces around it stay. What the web UI drops in silence (a bad number, another kind of network, a tag that is
not closed) is an error here, or a note where the caller is lenient.

Extension: a strength may be a schedule over the steps, in the syntax of the extension sd-webui-loractl: strengths at
shares of the steps, `0@0,0.8@0.5`, with straight lines between them.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass
from math import isfinite

from haori.core.errors import InputError, nearest

__all__ = ["MAX_PROMPT", "MAX_STRENGTH", "AdapterTag", "Schedule", "TaggedPrompt", "parse_prompt"]

MAX_PROMPT = 8_000  # characters
MAX_STRENGTH = 100.0
_MAX_TAGS = 64
_MAX_POINTS = 64
_SHOWN = 80
_WORDS = ("lora", "lyco")
_NAMED = ("te", "unet", "dyn")
_OPENING = re.compile(r"<(\w+):")
# Without its colon the web UI takes it for ordinary text.
_BROKEN = re.compile(r"<\s*(?:lora|lyco|hypernet)\b(?!:)|<\s+(?:lora|lyco|hypernet):", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Schedule:
    """A strength that changes over the steps.

    Attributes:
        points: Share of the steps (0 is the first, 1 the last) and strength there, shares in ascending order; at a
            share that is given twice the strength jumps.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, share: float) -> float:
        """Return the strength at a share of the steps; before the first and after the last point it stays."""
        after = bisect_right([point for point, _ in self.points], share)
        if after == 0:
            return self.points[0][1]
        if after == len(self.points):
            return self.points[-1][1]
        (start, low), (end, high) = self.points[after - 1], self.points[after]
        return low + (high - low) * (share - start) / (end - start)


@dataclass(frozen=True)
class AdapterTag:
    """An adapter that a prompt names.

    Attributes:
        name: As it is written there.
        text_encoder: Strength on the text encoders, which read the prompt once, before the first step.
        unet: Strength on the UNet or transformer; with a schedule, that at the first step.
        schedule: How that strength changes over the steps, if it does.
    """

    name: str
    text_encoder: float = 1.0
    unet: float = 1.0
    schedule: Schedule | None = None


@dataclass(frozen=True)
class TaggedPrompt:
    """A prompt without its tags.

    Attributes:
        text: What is drawn.
        tags: In the order of the prompt; a name may occur several times, and its strengths add.
        notes: What was left out, a sentence each; empty where the prompt was read strictly.
    """

    text: str
    tags: tuple[AdapterTag, ...]
    notes: tuple[str, ...] = ()


def parse_prompt(prompt: str, *, lenient: bool = False) -> TaggedPrompt:
    """Take the tags out of a prompt.

    Args:
        prompt: Text with tags.
        lenient: Leave tags out that cannot be used, each with a note.

    Raises:
        InputError: The prompt is too long, or (unless lenient) a tag cannot be used.
    """
    if len(prompt) > MAX_PROMPT:
        raise InputError(f"The prompt has {len(prompt):,} characters; it may have {MAX_PROMPT:,}.")
    text: list[str] = []
    tags: list[AdapterTag] = []
    notes: list[str] = []
    position = 0
    while opening := _OPENING.search(prompt, position):
        text.append(prompt[position : opening.start()])
        end = prompt.find(">", opening.end())
        position = len(prompt) if end < 0 else end + 1
        try:
            tags.append(_tag(opening, None if end < 0 else prompt[opening.end() : end], prompt))
            _check_count(tags)
        except InputError as error:
            if not lenient:
                raise
            notes.append(f"{error} It was left out.")
            del tags[_MAX_TAGS:]
    text.append(prompt[position:])
    left = "".join(text)
    if broken := _BROKEN.search(left):
        sentence = (
            f"{_shown(left[broken.start() :])} in the prompt looks like a tag and is none; write <lora:NAME:0.7>, "
            "without spaces before the first colon."
        )
        if not lenient:
            raise InputError(sentence)
        notes.append(f"{sentence} It was read as ordinary text.")
    return TaggedPrompt(left, tuple(tags), tuple(notes))


def _check_count(tags: list[AdapterTag]) -> None:
    if len(tags) > _MAX_TAGS:
        raise InputError(f"The prompt names more than {_MAX_TAGS} adapters; blend some of them into one.")


def _tag(opening: "re.Match[str]", body: str | None, prompt: str) -> AdapterTag:
    word = opening[1]
    shown = _shown(prompt[opening.start() :] if body is None else f"{opening[0]}{body}>")
    if body is None:
        raise InputError(f"The tag {shown} is not closed: a '>' is missing.")
    if "<" in body:
        raise InputError(f"The tag {shown} has a '<' inside; close each tag with '>' before the next begins.")
    if word == "hypernet":
        raise InputError(f"The tag {shown} names a hypernetwork, which is not supported; use a LoRA: <lora:NAME:0.7>.")
    if word not in _WORDS:
        meant = nearest(word.lower(), _WORDS) or "known are <lora:...> and <lyco:...>."
        raise InputError(f"The tag {shown} names the unknown kind of network {word[:_SHOWN]!r}; {meant}")
    positional, named = _arguments(body, shown)
    return _adapter(positional, named, shown)


def _arguments(body: str, shown: str) -> tuple[list[str], dict[str, str]]:
    positional: list[str] = []
    named: dict[str, str] = {}
    for argument in body.split(":"):
        if argument.count("=") != 1:
            positional.append(argument)
            continue
        key, value = (part.strip() for part in argument.split("="))
        if key not in _NAMED:
            hint = nearest(key, _NAMED) or "known are te and unet."
            raise InputError(f"The tag {shown} sets the unknown {key[:_SHOWN]!r}; {hint}")
        if key in named:
            raise InputError(f"The tag {shown} sets {key!r} twice.")
        named[key] = value
    return positional, named


def _adapter(positional: list[str], named: dict[str, str], shown: str) -> AdapterTag:
    name = positional[0].strip() if positional else ""
    if not name:
        raise InputError(f"The tag {shown} names no adapter; write <lora:NAME:0.7>.")
    if len(positional) > 3 or "dyn" in named:
        raise InputError(
            f"The tag {shown} asks for another rank (dyn), which is not supported; write <lora:NAME:TE:UNET>, "
            "and change ranks with `haori resize`."
        )
    first = named.get("te", positional[1] if len(positional) > 1 else "1")
    unet = named.get("unet", positional[2] if len(positional) > 2 else first)
    both = "te" not in named and unet is first
    text_encoder = _strength(first, shown).at(0.0) if both else _number(first, shown)
    schedule = _strength(unet, shown)
    return AdapterTag(name, text_encoder, schedule.at(0.0), schedule if len(schedule.points) > 1 else None)


def _strength(text: str, shown: str) -> Schedule:
    """Return a strength; one that stays is a schedule of one point."""
    if "@" not in text and "," not in text:
        return Schedule(((0.0, _number(text, shown)),))
    points: list[tuple[float, float]] = []
    for point in text.split(","):
        strength, at, share = point.partition("@")
        if not at:
            raise InputError(
                f"The tag {shown} has a strength {point.strip()[:_SHOWN]!r} without its place; write a schedule as "
                "strength@share of the steps, like 0@0,0.8@0.5."
            )
        points.append((_number(share, shown), _number(strength, shown)))
    shares = [share for share, _ in points]
    if shares != sorted(shares) or shares[0] < 0 or shares[-1] > 1:
        raise InputError(f"The tag {shown} has a schedule whose shares of the steps do not rise from 0 to 1.")
    if len(points) > _MAX_POINTS:
        raise InputError(f"The tag {shown} has a schedule of {len(points):,} points; it may have {_MAX_POINTS}.")
    return Schedule(tuple(points))


def _number(text: str, shown: str) -> float:
    if not _NUMBER.fullmatch(text.strip()) or not isfinite(number := float(text)):
        hint = "; a schedule can only be the denoiser's" if "@" in text else ""
        raise InputError(
            f"The tag {shown} has {text.strip()[:_SHOWN]!r} where a number belongs{hint}; write <lora:NAME:0.7>."
        )
    if abs(number) > MAX_STRENGTH:
        raise InputError(
            f"The tag {shown} has the strength {number:g}; strengths lie between -{MAX_STRENGTH:g} and "
            f"{MAX_STRENGTH:g}, and most adapters are made for 0.5 to 1."
        )
    return number


def _shown(tag: str) -> str:
    return repr(tag if len(tag) <= _SHOWN else f"{tag[:_SHOWN]}...")
