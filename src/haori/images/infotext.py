"""How a picture was made, as the text that AUTOMATIC1111's web UI keeps in PNG files under `parameters`.

    a cat <lora:lineart:0.7>
    Negative prompt: blurred
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Lora hashes: "lineart: 0123456789ab"

What is written is read back the same, or refused. Texts of others come from anywhere, so they are read within bounds,
in one pass, and as data alone.
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import FileFormatError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Infotext",
    "adapter_hashes",
    "find_infotext",
    "hashes_text",
    "picture_infotext",
    "png_bytes",
    "read_infotext",
]

_MAX_TEXT = 64 << 10  # characters
_MAX_SETTINGS = 200
_MAX_FILE_BYTES = 256 << 20
_KEYWORD = "parameters"
_NEGATIVE = "Negative prompt:"
_KEY = re.compile(r"\w[\w \-/.+]{0,79}")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])*"')
_HASH = re.compile(r"(.{1,300}?): ([0-9a-f]{6,64})(?:, |$)")


@dataclass(frozen=True)
class Infotext:
    """What is known of how a picture was made.

    Attributes:
        prompt: With its tags.
        negative: What the picture should not show; empty if nothing was said.
        settings: The others by their names, such as `Steps` and `CFG scale`, in order.
    """

    prompt: str
    negative: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Return it as one text.

        Raises:
            InputError: It would be read as something else: a line of a prompt begins with `Negative prompt:`.
        """
        negative = f"\n{_NEGATIVE} {self.negative}" if self.negative else ""
        settings = ", ".join(f"{name}: {_quoted(value)}" for name, value in self.settings.items())
        text = f"{self.prompt}{negative}\n{settings}"
        if read_infotext(text) != self:
            raise InputError(
                f"A line of the prompt begins with {_NEGATIVE!r}, which the text in the PNG could not tell from the "
                "negative prompt; write it otherwise."
            )
        return text


def read_infotext(text: str, origin: str = "The text") -> Infotext:
    """Read a text of the web UI or of ours.

    Args:
        text: As it stands in a picture.
        origin: What messages begin with.

    Raises:
        FileFormatError: It is too long, or does not end in a line of settings.
    """
    if len(text) > _MAX_TEXT:
        raise FileFormatError(f"{origin} is {len(text):,} characters long; how a picture was made takes {_MAX_TEXT:,}.")
    body, _, last = text.rstrip("\n").rpartition("\n")
    if not last.startswith("Steps: "):
        raise FileFormatError(
            f"{origin} does not say how a picture was made: its last line must begin with 'Steps: ' and begins with "
            f"{last[:60]!r}."
        )
    prompt, negative = f"\n{body}", ""
    at = prompt.find(f"\n{_NEGATIVE}")
    if at >= 0:
        prompt, negative = prompt[:at], prompt[at + 1 + len(_NEGATIVE) :].removeprefix(" ")
    return Infotext(prompt[1:], negative, _settings(last, origin))


def _settings(line: str, origin: str) -> dict[str, str]:
    found: dict[str, str] = {}
    position = 0
    while position < len(line):
        colon = line.find(":", position)
        key = line[position:colon].strip() if colon >= 0 else ""
        if not _KEY.fullmatch(key):
            raise FileFormatError(f"{origin} has {line[position : position + 60]!r} where 'name: value' belongs.")
        if key in found or len(found) == _MAX_SETTINGS:
            raise FileFormatError(f"{origin} sets {key!r} twice or has more than {_MAX_SETTINGS} settings.")
        start = colon + 1 + (line[colon + 1 : colon + 2] == " ")
        quoted = _QUOTED.match(line, start)
        if quoted and (quoted.end() == len(line) or line[quoted.end()] == ","):
            found[key], position = _unquoted(quoted[0]), quoted.end() + 1
        else:
            end = line.find(",", start)
            end = len(line) if end < 0 else end
            found[key], position = line[start:end], end + 1
    return found


def _quoted(value: str) -> str:
    plain = value == value.strip() and not re.search(r'[,:"\n]', value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def hashes_text(hashes: Mapping[str, str]) -> str:
    """Return adapters with the first 12 digits of their hashes, as `Lora hashes` holds them."""
    return ", ".join(f"{name}: {digits}" for name, digits in hashes.items())


def adapter_hashes(text: str) -> dict[str, str]:
    """Return the hashes of `Lora hashes` by adapter."""
    return {match[1]: match[2] for match in _HASH.finditer(text)}


def png_bytes(image: "Image", text: str) -> bytes:
    """Return a picture as a PNG file that says how it was made; the same picture and text give the same bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_KEYWORD, text)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def picture_infotext(source: "Path | bytes", origin: str) -> str:
    """Return the text in a PNG file.

    Args:
        source: The file, or its content.
        origin: What messages begin with.

    Raises:
        FileFormatError: It is no PNG, is damaged or too large, or holds no such text.
    """
    text = find_infotext(source, origin)
    if text is None:
        raise FileFormatError(f"{origin} does not say how it was made: it has no text {_KEYWORD!r}.")
    return text


def find_infotext(source: "Path | bytes", origin: str) -> str | None:
    """Return the text in a PNG file, or None if it has none.

    Raises:
        FileFormatError: It is no PNG, or is damaged or too large.
    """
    from haori.data.pictures.opening import MAX_PIXELS, require_pillow

    require_pillow()
    from PIL import Image

    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size > _MAX_FILE_BYTES:
        raise FileFormatError(f"{origin} has {size >> 20} MiB; pictures may have {_MAX_FILE_BYTES >> 20} MiB.")
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=("PNG",)) as image:
            pixels = image.width * image.height
            picture: Any = image
            # The text may also stand behind the pixels.
            text = picture.info.get(_KEYWORD) or (picture.text.get(_KEYWORD) if pixels <= MAX_PIXELS else None)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
            raise
        raise FileFormatError(f"{origin} is no PNG file that can be read: {str(error)[:200] or 'damaged'}.") from None
    return None if text is None else str(text)
