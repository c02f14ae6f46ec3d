"""What a request to an OpenAI route may hold. Nothing is ignored in silence.

A field that is not served is refused by its name, unless its value switches it off. An unknown field is refused
with the nearest name. A few that clients always send and that change no answer are taken and have no effect.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from haori.core.errors import nearest
from haori.serve.request import Sampling
from haori.server.errors import ApiError, describe_problem

__all__ = ["ChoosingFields", "RequestPart", "SamplingFields", "StreamOptions", "misplaced"]

_LONGEST_NAME = 100
_OFF: tuple[Any, ...] = (None, False, [], {}, "", "none")


class RequestPart(BaseModel):
    """Base of every part of a request: strict types, unknown fields refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Known fields that are not served, with the values that say nothing, beside those that switch off."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {}
        for name, value in given.items():
            context = {"name": ascii(name)[1:-1][:_LONGEST_NAME], "field": "{field}"}
            if not _is_text(value):
                text = "'{field}' holds half of a character, which is no text; send whole ones."
                raise PydanticCustomError("invalid_text", text, context)
            if name in known:
                kept[name] = value
                continue
            if name not in cls.unsupported:
                hint = nearest(context["name"], known) or "take it out."
                raise PydanticCustomError(
                    "unknown_field", "There is no field '{field}'; {hint}", {**context, "hint": hint}
                )
            silent = cls.unsupported[name]
            if value not in (*(() if True in silent and value is False else _OFF), *silent):
                text = "'{field}' is not supported by this server; take it out."
                raise PydanticCustomError("unsupported_field", text, context)
        return kept


class StreamOptions(RequestPart):
    """How a stream is sent."""

    include_usage: bool | None = Field(default=None, description="Send the token counts in a last chunk.")
    include_obfuscation: bool | None = Field(default=None, description="Taken, without effect.")


class ChoosingFields(RequestPart):
    """The fields that all routes share that write text."""

    model: str = Field(
        min_length=1, max_length=1000, description="The base, an adapter (`support`, `support@2`), or a blend such as "
        "`a:0.4+b:0.6`.",
    )  # fmt: skip
    temperature: FiniteFloat | None = Field(default=None, ge=0.0, le=100.0, description="0 takes the likeliest token.")
    top_p: FiniteFloat | None = Field(default=None, gt=0.0, le=1.0, description="Likeliest tokens of this total share.")
    top_k: int | None = Field(default=None, ge=-1, description="So many of the likeliest tokens; 0 or -1 for all.")
    min_p: FiniteFloat | None = Field(default=None, ge=0.0, le=1.0, description="Share of the likeliest token's.")
    repetition_penalty: FiniteFloat | None = Field(default=None, gt=0.0, le=10.0, description="1 changes nothing.")
    presence_penalty: FiniteFloat | None = Field(default=None, ge=-2.0, le=2.0, description="Against tokens in use.")
    frequency_penalty: FiniteFloat | None = Field(default=None, ge=-2.0, le=2.0, description="The same per use.")
    logit_bias: dict[str, FiniteFloat] | None = Field(default=None, description="Added to logits, by token id.")
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1, description="Makes sampling repeatable.")
    stop: str | list[str] | None = Field(default=None, description="The answer ends before any of these.")
    ignore_eos: bool | None = Field(default=None, description="Go on after tokens that end an answer.")
    min_tokens: int | None = Field(default=None, ge=0, description="No end token before so many tokens.")
    stream: bool | None = Field(default=None, description="Send the answer as it is made, as server-sent events.")
    user: str | None = Field(default=None, description="Taken, without effect.")
    metadata: Any = Field(default=None, description="Taken, without effect.")
    service_tier: str | None = Field(default=None, description="Taken, without effect.")
    prompt_cache_key: str | None = Field(default=None, description="Taken, without effect: prefixes are cached anyway.")
    prompt_cache_retention: str | None = Field(default=None, description="Taken, without effect.")
    safety_identifier: str | None = Field(default=None, description="Taken, without effect.")

    @property
    def streams(self) -> bool:
        """Say whether the answer is to be streamed."""
        return bool(self.stream)

    def sampling(self, *, longest: int | None, limit: int | None, field: str = "max_tokens", **more: Any) -> Sampling:
        """Return how tokens are chosen.

        Args:
            longest: Longest answer that was asked for, in tokens.
            limit: Longest answer that this server gives.
            field: What the longest answer is called here.
            more: Further fields of `Sampling`.

        Raises:
            ApiError: A value is out of range, or fields contradict one another.
        """
        if limit is not None and longest is not None and longest > limit:
            message = f"{longest} tokens were asked for; this server gives at most {limit}."
            raise ApiError(400, message, param=field, code="invalid_value")
        plain = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
                 "ignore_eos", "min_tokens")  # fmt: skip
        chosen = {name: value for name in plain if (value := getattr(self, name)) is not None}
        try:
            return Sampling(
                **chosen,
                max_tokens=longest if longest is not None else limit,
                top_k=max(self.top_k or 0, 0),
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                logit_bias=self._bias(),
                **more,
            )
        except ValidationError as error:
            problems = [{**found, "loc": ("body", *found["loc"])} for found in error.errors(include_url=False)]
            message, param, code = describe_problem(problems)
            raise ApiError(400, message, param=param, code=code) from None

    def _bias(self) -> dict[int, float]:
        bias = {}
        for token, value in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) <= 9):
                message = f"'logit_bias' has {token[:40]!r}, which is no token id; ids are numbers such as \"42\"."
                raise ApiError(400, message, param="logit_bias", code="invalid_value")
            bias[int(token)] = value
        return bias


class SamplingFields(ChoosingFields):
    """The fields that chat and plain completions share."""

    max_tokens: int | None = Field(default=None, ge=1, description="Longest answer in tokens.")
    n: int | None = Field(default=None, ge=1, description="Answers to each prompt.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")
    store: bool | None = Field(default=None, description="Taken, without effect: nothing is stored.")

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "SamplingFields":
        if self.stream_options is not None and not self.streams:
            raise misplaced("stream_options", "'{field}' is only for 'stream': true.")
        return self

    @property
    def wants_usage(self) -> bool:
        """Say whether a stream is to end with token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def misplaced(field: str, sentence: str) -> PydanticCustomError:
    """Return what a validator raises when a field does not go with the others; `{field}` stands for where it is."""
    return PydanticCustomError("misplaced_field", sentence, {"name": field, "field": "{field}"})


def _is_text(value: Any) -> bool:
    """Say whether every string in a JSON value can be encoded; JSON may hold halves of characters, UTF-8 may not."""
    left = [value]  # no recursion: a value may be nested as deeply as Python reads it
    while left:
        item = left.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= letter <= "\udfff" for letter in item):
                return False
        elif isinstance(item, list):
            left += item
        elif isinstance(item, dict):
            left += (*item, *item.values())
    return True
