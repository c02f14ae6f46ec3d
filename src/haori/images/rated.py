"""Pictures of several systems on the same prompts and seeds: drawn for it, or found in folders.

What both have in common is an item: a prompt without its tags, and a seed; or, where pictures do not say how they were
made, a file name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import FileFormatError, InputError
from haori.images.infotext import picture_infotext, read_infotext
from haori.images.request import PictureRequest
from haori.images.tags import parse_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from haori.images.generation import PictureGenerator, StepsDone

__all__ = ["DrawnSystems", "draw_systems", "found_systems", "system_tags"]

_BASE = "base"
_NAMED = re.compile(r"([^=<>:]+)=(.+)", re.DOTALL)
_SHOWN = 3


@dataclass(frozen=True)
class DrawnSystems:
    """Pictures of systems.

    Attributes:
        prompts: What was asked for, without tags, by item.
        pictures: By system and item.
        files: PNG files that say how they were made, by system in the order of items; empty for those of folders.
        notes: What was left out or should be known, a sentence each.
    """

    prompts: dict[str, str]
    pictures: "dict[str, dict[str, Image]]"
    files: dict[str, list[bytes]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def system_tags(text: str) -> tuple[str, str]:
    """Read a system: `base`, `lineart:0.7`, `a:0.4+b:0.6`, `<lora:a:0.7>`, each with `NAME=` before it if wanted.

    Returns:
        Its name, and what is added to prompts.

    Raises:
        InputError: It cannot be read.
    """
    named = _NAMED.fullmatch(text)
    name, what = (named[1].strip(), named[2].strip()) if named else (text.strip(), text.strip())
    if what == _BASE:
        return name, ""
    if not what:
        raise InputError("A system is empty; write base, an adapter such as lineart:0.7, or tags.")
    tags = what if "<" in what else "".join(f"<lora:{part.strip()}>" for part in what.split("+"))
    if not parse_prompt(tags).tags:
        raise InputError(f"The system {text[:80]!r} names no adapter; write base, lineart:0.7 or <lora:lineart:0.7>.")
    return name, tags


def draw_systems(
    generator: "PictureGenerator",
    systems: Mapping[str, str],
    template: PictureRequest,
    prompts: Sequence[str],
    seeds: Sequence[int],
    on_step: "Callable[[StepsDone], None] | None" = None,
) -> DrawnSystems:
    """Draw every prompt with every seed by every system.

    Args:
        generator: What draws.
        systems: What is added to prompts, by name.
        template: Everything but prompt and seed.
        prompts: What is asked for.
        seeds: Of the pictures.
        on_step: As for `PictureGenerator.draw`.

    Raises:
        InputError: A prompt or an adapter cannot be used.
    """
    items = {_item(prompt, seed): (prompt, seed) for prompt in prompts for seed in seeds}
    if len(items) < len(prompts) * len(seeds):
        raise InputError("A prompt or a seed is given twice; each pair is rated once.")
    requests = [
        replace(template, prompt=f"{prompt} {tags}".strip(), seed=seed, count=1)
        for tags in systems.values()
        for prompt, seed in items.values()
    ]
    drawn = iter(generator.draw(requests, on_step))
    by_system = {name: {item: next(drawn) for item in items} for name in systems}
    notes = dict.fromkeys(note for found in by_system.values() for one in found.values() for note in one.notes)
    return DrawnSystems(
        {item: _bare(prompt) for item, (prompt, _) in items.items()},
        {name: {item: one.image for item, one in found.items()} for name, found in by_system.items()},
        {name: [one.png() for one in found.values()] for name, found in by_system.items()},
        tuple(notes),
    )


def found_systems(folders: Mapping[str, Path]) -> DrawnSystems:
    """Read pictures of folders and pair them: by prompt and seed if all say them, else by file name.

    Raises:
        InputError: A folder is none, has two pictures for the same prompt and seed, or they have nothing in common.
        DataError: A picture cannot be read.
    """
    from haori.data.pictures.opening import open_picture

    files = {name: _pictures(folder) for name, folder in folders.items()}
    by_text = {name: _by_text(found) for name, found in files.items()}
    told = all(found is not None for found in by_text.values())
    items = {name: found for name, found in by_text.items() if found is not None} if told else _by_name(files, folders)
    shared = [item for item in next(iter(items.values())) if all(item in found for found in items.values())]
    if not shared:
        how = "prompt and seed" if told else "file name"
        raise InputError(f"No picture has its counterpart of the same {how} in every folder; draw the same for all.")
    lone = [path for found in items.values() for item, (path, _) in found.items() if item not in shared]
    notes = []
    if lone:
        some = ", ".join(repr(str(path)) for path in lone[:_SHOWN])
        more = "" if len(lone) <= _SHOWN else " and others"
        notes.append(f"{len(lone)} pictures have no counterpart in every folder and are not rated: {some}{more}.")
    pictures = {
        name: {item: open_picture(found[item][0], repr(str(found[item][0]))).image for item in shared}
        for name, found in items.items()
    }
    if any(len({found[item].size for found in pictures.values()}) > 1 for item in shared):
        notes.append("Pictures of a pair differ in size, which may tell raters which is which.")
    return DrawnSystems({item: next(iter(items.values()))[item][1] for item in shared}, pictures, notes=tuple(notes))


def _pictures(folder: Path) -> list[Path]:
    from haori.data.pictures.folder import picture_files

    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder of pictures.")
    # A sheet that haori generate --grid wrote is no picture of its own.
    found = [path for path in picture_files(folder, str(folder))[0] if not path.name.endswith("-grid.png")]
    if not found:
        raise InputError(f"{str(folder)!r} holds no pictures.")
    return found


def _by_text(files: Sequence[Path]) -> dict[str, tuple[Path, str]] | None:
    """Return file and prompt by item; None if a file does not say how it was made."""
    found: dict[str, tuple[Path, str]] = {}
    for path in files:
        try:
            info = read_infotext(picture_infotext(path, repr(str(path))), repr(str(path)))
            prompt, seed = _bare(info.prompt), int(info.settings["Seed"])
        except (FileFormatError, KeyError, ValueError):
            return None
        item = _item(prompt, seed)
        if item in found:
            raise InputError(
                f"{str(found[item][0])!r} and {str(path)!r} have the same prompt and seed; a folder is one system, "
                "with one picture of each."
            )
        found[item] = (path, prompt)
    return found


def _by_name(
    files: Mapping[str, Sequence[Path]], folders: Mapping[str, Path]
) -> dict[str, dict[str, tuple[Path, str]]]:
    found: dict[str, dict[str, tuple[Path, str]]] = {}
    for name, paths in files.items():
        found[name] = {path.relative_to(folders[name]).with_suffix("").as_posix(): (path, "") for path in paths}
        if len(found[name]) < len(paths):
            raise InputError(f"{str(folders[name])!r} has two pictures whose names differ in their ending alone.")
    return found


def _bare(prompt: str) -> str:
    return " ".join(parse_prompt(prompt, lenient=True).text.split())


def _item(prompt: str, seed: int) -> str:
    return f"{_bare(prompt)} | seed {seed}"
