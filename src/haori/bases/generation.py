"""Generates text from token-id prompts: a left-padded batch of them, or one as a stream.

Works on a base and on a PEFT model over it. Stops at the end of a turn. The prompts come ready rendered; this
module knows nothing about chat templates beyond the names of end-of-turn tokens.
"""

import inspect
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haori.bases.detokenise import TextStream, text_of
from haori.bases.quiet import quiet_transformers
from haori.core.errors import InputError
from haori.core.model_config import rotary_changes_with_length
from haori.core.token_ids import embedding_rows, no_embedding

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["end_tokens", "generate", "stop_tokens", "stream"]

_BATCH_ROWS = 16
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<turn|>", "<|endoftext|>")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")
_DEFAULT_CONTEXT = 2048
_CACHES = ("past_key_values", "cache_params", "state")  # of attention, of Mamba, of RWKV


@dataclass(frozen=True)
class _Sampling:
    """How the next token is chosen and how many there may be."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[str]:
    """Return the answer to each prompt, without special tokens.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer; shorter where the context ends.
        temperature: 0 takes the most probable token at each step.
        top_p: Sample from the most probable tokens that hold this share of probability.
        seed: Seed of the sampling; the process's own random state is left alone.

    Raises:
        InputError: A prompt is empty, longer than the context or holds a token without embedding, or a setting is out
            of range.
    """
    sampling = _Sampling(max_new_tokens, temperature, top_p, seed)
    context = _check(model, tokenizer, prompts, sampling)
    stops = stop_tokens(end_tokens(model), tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0] if stops else 0
    answers = [""] * len(prompts)
    with _evaluation(model), _random_state(model, seed), _own_choices(model), quiet_transformers():
        for rows in _batches(prompts, alone=_minds_neighbours(model)):
            ids, mask = _left_padded([prompts[i] for i in rows], pad)
            width = ids.shape[1]
            config = _config(sampling, min(max_new_tokens, context - width), stops, pad)
            output = model.generate(
                input_ids=ids.to(_device(model)), attention_mask=mask.to(_device(model)), generation_config=config
            )
            for row, i in enumerate(rows):
                answers[i] = text_of(tokenizer, _until(output[row, width:].tolist(), stops))
    return answers


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the answer to one prompt as a stream, each part as soon as its text is certain.

    A character that is spread over several tokens is held back until it is whole. Takes what `generate` takes;
    the model is in evaluation mode until the answer ends or the iterator is closed.

    Raises:
        InputError: As for `generate`, before the first part.
    """
    sampling = _Sampling(max_new_tokens, temperature, top_p, seed)
    context = _check(model, tokenizer, [prompt], sampling)
    tokens = _tokens(model, tokenizer, list(prompt), sampling, min(max_new_tokens, context - len(prompt)))
    return _texts(tokenizer, tokens)


def end_tokens(model: Any) -> list[int]:
    """Return the ids that end an answer by the configurations of a model."""
    found: list[int] = []
    for name in ("generation_config", "config"):
        value = getattr(getattr(model, name, None), "eos_token_id", None)
        found.extend(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return list(dict.fromkeys(map(int, found)))


def stop_tokens(ends: Iterable[int], tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: a model's `end_tokens`, the tokenizer's, and end-of-turn tokens in use."""
    found = [*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    template = str(tokenizer.chat_template or "")
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    found.extend(tokenizer.convert_tokens_to_ids(t) for t in _END_OF_TURN if t in special and t in template)
    return list(dict.fromkeys(int(token) for token in found))


def _batches(prompts: Sequence[Sequence[int]], *, alone: bool) -> Iterator[list[int]]:
    """Yield the numbers of prompts that are answered together, those of like length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = 1 if alone else _BATCH_ROWS
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _minds_neighbours(model: Any) -> bool:
    """Say whether an answer depends on the rows beside it.

    Rotary angles that change with length go by the longest row, and RWKV reads the padding of short ones.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return rotary_changes_with_length(config) or "state" in _forward_arguments(model)


@contextmanager
def _own_choices(model: Any) -> Iterator[None]:
    """Put away what the model's own file says of generation: transformers fills in from it whatever is not said.

    A banned word or a penalty there would make this answer differ from the server's and the stream's.
    """
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    held = {id(owner): (owner, owner.generation_config) for owner in (model, base)}
    for owner, _ in held.values():
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in held.values():
            owner.generation_config = config


def _tokens(model: Any, tokenizer: Any, prompt: list[int], sampling: _Sampling, steps: int) -> Iterator[int]:
    """Yield the answer's token ids one by one, from a key-value cache."""
    import torch

    stops = set(stop_tokens(end_tokens(model), tokenizer))
    generator = torch.Generator(device=_device(model))
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    options = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    ids = torch.tensor([prompt], device=_device(model))  # B=1 T
    given = _forward_arguments(model)
    kept = next((name for name in _CACHES if name in given), "past_key_values")
    cache = None
    with _evaluation(model):
        for _ in range(steps):
            with torch.no_grad():
                output = model(input_ids=ids, use_cache=True, **{kept: cache}, **options)
                token = _choose(output.logits[0, -1], sampling, generator)
            if token in stops:
                return
            yield token
            cache = getattr(output, kept)
            ids = torch.tensor([[token]], device=_device(model))


def _texts(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text that each token makes certain, where it makes any."""
    text = TextStream(tokenizer)
    for token in tokens:
        if new := text.push(token):
            yield new
    if rest := text.finish():
        yield rest


def _choose(logits: "Tensor", sampling: _Sampling, generator: "torch.Generator") -> int:
    """Pick the next token from logits of shape V."""
    import torch

    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits.float() / sampling.temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= sampling.top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _left_padded(prompts: list[Sequence[int]], pad: int) -> "tuple[Tensor, Tensor]":
    """Return ids and attention mask of shape B T, each row flush right."""
    import torch

    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _config(sampling: _Sampling, max_new_tokens: int, stops: list[int], pad: int) -> Any:
    """State every choice, so that the defaults that came with the model change nothing."""
    from transformers import GenerationConfig

    choices: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        choices = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=pad, repetition_penalty=1.0,
        num_beams=1, use_cache=True, **choices,
    )  # fmt: skip


def _check(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: _Sampling) -> int:
    """Check what was given and return the model's context length in tokens."""
    if not model.can_generate():
        raise InputError(f"{type(model).__name__} is an encoder and generates no text; choose a language model.")
    if sampling.max_new_tokens < 1:
        raise InputError(f"max_new_tokens cannot be {sampling.max_new_tokens}; it must be at least 1.")
    if not 0 <= sampling.temperature <= 100:
        raise InputError(f"The temperature cannot be {sampling.temperature}; it must be from 0 to 100.")
    if not 0 < sampling.top_p <= 1:
        raise InputError(f"top_p cannot be {sampling.top_p}; it must be above 0 and at most 1.")
    context = _context(model)
    for prompt in prompts:
        if not prompt:
            raise InputError("A prompt is empty; give at least one token.")
        if len(prompt) >= context:
            raise InputError(
                f"A prompt of {len(prompt):,} tokens leaves no room for an answer in this model's context of "
                f"{context:,} tokens; shorten it."
            )
        if (lacking := no_embedding(tokenizer, prompt, embedding_rows(model.config))) is not None:
            raise InputError(f"The prompt cannot be read: {lacking}.")
    return context


def _context(model: Any) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    found = (getattr(config, key, None) for key in _CONTEXT_KEYS)
    return next((value for value in found if isinstance(value, int) and value > 0), _DEFAULT_CONTEXT)


def _keeps_logits(model: Any) -> bool:
    """Say whether the model can compute logits for the last position alone."""
    return "logits_to_keep" in _forward_arguments(model)


def _forward_arguments(model: Any) -> Collection[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters


def _device(model: "nn.Module") -> "torch.device":
    return next(model.parameters()).device


def _until(tokens: list[int], stops: Sequence[int]) -> list[int]:
    """Cut at the first stop token; what follows is padding."""
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


@contextmanager
def _evaluation(model: "nn.Module") -> Iterator[None]:
    """Put the model into evaluation mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _random_state(model: "nn.Module", seed: int | None) -> Iterator[None]:
    """Seed torch inside the block and put its random state back afterwards; without a seed, change nothing."""
    import torch

    devices = [_device(model)] if _device(model).type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
