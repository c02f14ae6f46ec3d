"""Limits of the HTTP server. A request beyond them is refused before it costs anything."""

import re

from pydantic import Field

from haori.core.errors import InputError
from haori.core.records import Record

__all__ = ["PictureSettings", "ServerSettings", "parse_size"]

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([kMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class ServerSettings(Record):
    """Limits of one server."""

    max_body_bytes: int = Field(default=1 << 20, ge=1, description="Largest request body.")
    max_prompt_tokens: int | None = Field(default=None, ge=1, description="Longest prompt; None for the context.")
    max_tokens: int | None = Field(default=None, ge=1, description="Longest answer; None for the rest of the context.")
    max_choices: int = Field(default=16, ge=1, description="Largest `n`.")
    max_prompts: int = Field(default=64, ge=1, description="Prompts in one completion request, or texts to embed.")
    max_answers: int = Field(default=128, ge=1, description="Prompts times `n`.")
    max_batch: int = Field(default=32, ge=1, description="Requests that run at once, as `/metrics` reports it.")
    max_preparing: int = Field(default=1024, ge=1, description="Requests that wait to be rendered and tokenised.")
    drain_s: float = Field(default=30.0, ge=0.0, description="Longest wait for running requests at the end.")
    metered_adapters: int = Field(default=200, ge=0, description="Adapters with series of their own in `/metrics`.")


class PictureSettings(Record):
    """Limits of what is drawn, and how requests are read."""

    max_body_bytes: int = Field(default=32 << 20, ge=1, description="Largest request body, pictures in it included.")
    max_pixels: int = Field(default=2048 * 2048, ge=64, description="Pixels of the largest picture.")
    max_steps: int = Field(default=150, ge=1, description="Steps of the sampler, also of a second pass.")
    max_pictures: int = Field(default=16, ge=1, description="Pictures of one request.")
    max_queue: int = Field(default=64, ge=1, description="Requests that wait to be drawn.")
    lenient: bool = Field(default=False, description="Leave out what cannot be used, with a warning in the reply.")


def parse_size(text: str) -> int:
    """Read `512MB`, `1GB` or `1.5G` as bytes.

    Raises:
        InputError: It is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if size < 1:
        raise InputError(f"{text!r} is no amount of memory; give one such as 512MB or 1GB.")
    return size
