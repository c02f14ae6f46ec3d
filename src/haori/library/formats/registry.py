"""The formats there are: one module each, in the order in which a file is shown to them."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import FileFormatError, InputError, nearest
from haori.library.formats.format import Format, Source, open_source

if TYPE_CHECKING:
    from haori.library.updates import AdapterUpdates

__all__ = ["FORMATS", "format_named", "format_of", "read_updates"]

FORMATS: dict[str, str] = {
    "gguf": "haori.library.formats.gguf",
    "fal": "haori.library.formats.fal",
    "peft": "haori.library.formats.peft",
    "xlabs": "haori.library.formats.xlabs",
    "kohya-flux": "haori.library.formats.kohya_flux",
    "onetrainer": "haori.library.formats.onetrainer",
    "omi": "haori.library.formats.omi",
    "comfyui": "haori.library.formats.comfyui",
    "diffusers": "haori.library.formats.diffusers",
    "kohya": "haori.library.formats.kohya",
}
"""The module of each format; it gives `FORMAT`."""


def format_named(name: str) -> Format:
    """Return a format by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in FORMATS:
        hint = nearest(name, sorted(FORMATS)) or f"there are {', '.join(sorted(FORMATS))}."
        raise InputError(f"There is no file format {name[:40]!r}; {hint}")
    found: Format = import_module(FORMATS[name]).FORMAT
    return found


def format_of(source: Source) -> Format:
    """Return the format that a file is of.

    Raises:
        FileFormatError: It is of none that is known; some of its keys are named.
    """
    for found in _all():
        if found.detect(source):
            return found
    keys = ", ".join(repr(key[:80]) for key in sorted(source.tensors)[:3])
    what = f"its keys, such as {keys}, are" if keys else "it is"
    titles = "; ".join(found.title for found in _all())
    raise FileFormatError(f"{str(source.path)!r} is no adapter of a known format: {what} of none of them ({titles}).")


def read_updates(path: Path, base_config: Mapping[str, Any] | None = None) -> "AdapterUpdates":
    """Read an adapter of any known format into the neutral form.

    Args:
        path: A folder as PEFT writes it, a safetensors file or a GGUF file.
        base_config: The config.json of its base, where it is known; see `Source`.

    Raises:
        FileFormatError: It is of no known format, damaged, or holds what cannot be read; the key is named.
    """
    source = open_source(path, base_config)
    return format_of(source).read(source)


def _all() -> Iterator[Format]:
    return (format_named(name) for name in FORMATS)
