"""What the access log tells of one request, collected while it is answered: never a prompt, an answer or a key."""

import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RequestNote", "note_of"]


@dataclass
class RequestNote:
    """One line of the access log; times are in seconds of the performance counter."""

    id: str
    method: str
    path: str
    client: str | None
    started_s: float = field(default_factory=time.perf_counter)
    status: int | None = None
    key: str | None = None
    model: str | None = None
    serves: str | None = None
    adapters: tuple[str, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    generated_tokens: int | None = None
    first_token_s: float | None = None
    pictures: int | None = None
    picture_steps: int | None = None
    finish: str | None = None
    error: str | None = None


def note_of(scope: MutableMapping[str, Any]) -> RequestNote:
    """Return the note of a request."""
    note = scope["haori.note"]
    assert isinstance(note, RequestNote)
    return note
