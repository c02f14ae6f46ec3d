"""What is said to a vLLM server over `/v1/completions`, and how its chunks are read (vLLM 0.32).

Prompts go as token ids and answers come back as token ids, so neither side's tokenizer or template can differ. Text
is made here, by the same code as the native engine's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from haori.core.errors import HaoriError
from haori.serve.request import TextRequest, TokenLogprob

__all__ = ["VllmChunk", "completion_body", "read_chunk"]

_TOKEN = "token_id:"  # noqa: S105 - how vLLM writes a token where its text would not do


@dataclass(frozen=True)
class VllmChunk:
    """A stream chunk as vLLM sends it.

    Attributes:
        tokens: New token ids.
        logprobs: One for each, where asked for.
        finish: vLLM's reason, such as `stop`, `length` or `abort`; None while the answer goes on.
        cached_tokens: Prompt tokens that were taken from its prefix cache, on the chunk that reports it.
        error: Its own words, if it failed or found out late that it does not take the request.
        error_status: The HTTP status that it would have sent with them.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    cached_tokens: int | None = None
    error: str | None = None
    error_status: int = 500


def completion_body(request: TextRequest, model: str, *, room: int, stop_tokens: frozenset[int]) -> dict[str, Any]:
    """Return the request that asks vLLM for one answer.

    Everything that vLLM has a default for is said, as its defaults may come from the base's generation_config.json.

    Args:
        request: What is wanted.
        model: The name that vLLM knows the adapter, or the base, by.
        room: Tokens that the context has left for the answer.
        stop_tokens: Ids that end an answer.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": min(sampling.max_tokens or room, room),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "min_tokens": sampling.min_tokens,
        "ignore_eos": sampling.ignore_eos,
        # vLLM heeds these even where it is told to ignore end tokens.
        "stop_token_ids": [] if sampling.ignore_eos else sorted(stop_tokens),
        "stop": list(sampling.stop),
    }
    if request.owner:
        body["cache_salt"] = request.owner  # no owner finds prefixes of another
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.json_schema is not None:
        schema = sampling.json_schema
        body["structured_outputs"] = {"json": schema} if schema else {"json_object": True}
    if sampling.grammar is not None:
        body["structured_outputs"] = {"grammar": sampling.grammar}
    return body


def read_chunk(data: Mapping[str, Any], *, tops: int | None) -> VllmChunk:
    """Read one event of a stream.

    Args:
        data: The event.
        tops: Likeliest tokens wanted at each position; None without log-probabilities.

    Raises:
        HaoriError: It is not what vLLM sends.
    """
    try:
        if error := data.get("error"):
            return VllmChunk(error=str(error["message"]), error_status=int(error.get("code") or 500))
        details = (data.get("usage") or {}).get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens")
        if not data["choices"]:
            return VllmChunk(cached_tokens=int(cached or 0))
        choice = data["choices"][0]
        tokens = tuple(int(token) for token in choice["token_ids"] or ())
        logprobs = () if tops is None else _logprobs(choice["logprobs"], tokens, tops)
        return VllmChunk(tokens, logprobs, choice["finish_reason"], cached)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise HaoriError(
            f"The vLLM server sent an answer that cannot be read ({error!r}); use vLLM 0.32 or a later one."
        ) from None


def _logprobs(given: Mapping[str, Any] | None, tokens: tuple[int, ...], tops: int) -> tuple[TokenLogprob, ...]:
    if not tokens:
        return ()
    if given is None:
        raise ValueError("no log-probabilities")
    found = []
    for token, value, likeliest in zip(tokens, given["token_logprobs"], given["top_logprobs"], strict=True):
        # vLLM names the chosen token beside the likeliest, wherever it ranks.
        ranked = sorted(((int(name.removeprefix(_TOKEN)), float(of)) for name, of in likeliest.items()), key=_rank)
        found.append(TokenLogprob(token, float(value), tuple(ranked[:tops])))
    return tuple(found)


def _rank(pair: tuple[int, float]) -> tuple[float, int]:
    return -pair[1], pair[0]
