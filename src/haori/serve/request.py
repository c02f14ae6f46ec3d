"""What a caller asks of the text engine and what comes back. Knows nothing about HTTP, models or tensors."""

import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from haori.core.records import Record

__all__ = [
    "BASE",
    "AdapterMix",
    "Deliver",
    "Embedded",
    "Fault",
    "Finish",
    "Sampling",
    "StreamChunk",
    "TextRequest",
    "TokenLogprob",
]

AdapterMix = tuple[tuple[str, float], ...]
"""Adapters that act on a request: (content id, strength) each; none for the bare base."""

BASE: AdapterMix = ()

Finish = Literal["stop", "length", "cancelled", "error"]

Fault = Literal["engine", "request", "outage"]
"""What an error comes from: the engine, what was asked for, or another server that the engine needs."""


class Sampling(Record):
    """How the next token is chosen, and when to stop. `temperature` 0 always takes the likeliest token."""

    max_tokens: int | None = Field(default=None, ge=0, description="Longest answer; by default what the context holds. "
                                   "0 reads the prompt alone.")  # fmt: skip
    temperature: float = Field(default=1.0, ge=0.0, le=100.0, description="0 takes the likeliest token.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="Only the likeliest tokens of this total share.")
    top_k: int = Field(default=0, ge=0, description="Only so many of the likeliest tokens; 0 for all.")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0, description="Only tokens at least so likely as this share of the "
                         "likeliest one.")  # fmt: skip
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0, description="Divides the logits of tokens in "
                                      "prompt and answer (CTRL, arXiv 1909.05858).")  # fmt: skip
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0, description="Taken off tokens in the answer.")
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0, description="Taken off per occurrence.")
    logit_bias: dict[int, float] = Field(default_factory=dict, max_length=1024, description="Added to logits by id.")
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1, description="Makes sampling repeatable.")
    stop: tuple[str, ...] = Field(default=(), max_length=16, description="The answer ends before any of these.")
    ignore_eos: bool = Field(default=False, description="Go on after tokens that end an answer.")
    min_tokens: int = Field(default=0, ge=0, description="No end token before so many tokens.")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Report log-probabilities, and of so many of "
                                 "the likeliest tokens.")  # fmt: skip
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20, description="The same of the prompt's tokens.")
    json_schema: dict[str, Any] | None = Field(default=None, description="The answer is JSON that fits this schema; an "
                                               "empty schema allows any object.")  # fmt: skip
    grammar: str | None = Field(default=None, description="The answer fits this grammar, written in llguidance's form "
                                "of Lark, or in GBNF.")  # fmt: skip
    shown_tokens: frozenset[int] = Field(default=frozenset(), description="Special tokens that are part of the text.")

    @model_validator(mode="after")
    def _no_empty_stop(self) -> "Sampling":
        if not all(self.stop):
            raise ValueError("a stop string cannot be empty")
        return self

    @model_validator(mode="after")
    def _one_constraint(self) -> "Sampling":
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("an answer is kept to a JSON schema or to a grammar, not to both")
        return self


@dataclass(frozen=True)
class TextRequest:
    """One answer wanted.

    Attributes:
        id: Unique name, for logs and cancellation.
        prompt: Token ids.
        adapters: Which adapters act, and how strongly.
        sampling: How tokens are chosen.
        queue: Requests of one queue wait for one another; queues take turns. The model's name as the caller gave it.
        owner: Whose it is, an API key's hash, say; owners take turns before their queues do, and share no prefixes.
        prompt_targets: With `prompt_logprobs`: ids whose log-probabilities are wanted too, by position in the prompt.
    """

    id: str
    prompt: tuple[int, ...]
    adapters: AdapterMix = BASE
    sampling: Sampling = field(default_factory=Sampling)
    queue: str = ""
    owner: str = ""
    prompt_targets: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def turn(self) -> tuple[str, str]:
        """Return the queue that it waits in: its owner's, and of those the one with its name."""
        return self.owner, self.queue


@dataclass(frozen=True, slots=True, init=False)
class TokenLogprob:
    """Log-probability (nats, before temperature and filters) of a token, and of the likeliest ones at its position.

    Args:
        token: Its id.
        logprob: Of the token.
        top: Ids and log-probabilities of the likeliest. They are kept as bytes: twenty pairs of Python's numbers take
            ten times the memory, and many of these may wait for a slow client.
        rank: The token's rank among all, 1 for the likeliest; None where it was not asked for.
    """

    token: int
    logprob: float
    _top: bytes
    rank: int | None

    def __init__(
        self, token: int, logprob: float, top: Sequence[tuple[int, float]] = (), rank: int | None = None
    ) -> None:
        pairs = itertools.chain.from_iterable(top)
        object.__setattr__(self, "token", token)
        object.__setattr__(self, "logprob", logprob)
        object.__setattr__(self, "_top", struct.pack("=" + "qd" * len(top), *pairs) if top else b"")
        object.__setattr__(self, "rank", rank)

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """Return ids and log-probabilities of the likeliest tokens, then of those that were asked for by id."""
        return tuple(struct.iter_unpack("=qd", self._top))


@dataclass(frozen=True)
class StreamChunk:
    """A further part of an answer; the last one has `finish` set.

    Attributes:
        text: New text; may be empty while bytes of a character or a possible stop string are held back.
        tokens: New token ids (more than one when text was held back).
        logprobs: One for each of `tokens`, where asked for.
        finish: Why the answer ended: an end token or stop string, its length, cancelled, or an error.
        error: A sentence, when `finish` is `error`.
        fault: What the error comes from.
        cached_tokens: Prompt tokens that were taken from the prefix cache; on the last chunk.
        prompt_logprobs: One for each token of the prompt from the second on, where asked for; on the first chunk.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    error: str | None = None
    cached_tokens: int = 0
    fault: Fault = "engine"
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Embedded(NamedTuple):
    """The answer to texts that were to be embedded: a vector for each, and how many tokens each has."""

    vectors: Sequence[Sequence[float]]
    tokens: Sequence[int]


Deliver = Callable[[StreamChunk], None]
"""Takes stream chunks as they are made, on the engine's thread: it must return at once."""
