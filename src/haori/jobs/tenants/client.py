"""Training loops of one's own, in process: the primitives of a training session, over one base on this machine.

    client = haori.training_client("smollm2-135m-instruct", rank=16)
    client.forward_backward([client.datum(question, answer)])
    client.optim_step(learning_rate=1e-3)
    print(client.sample(question, max_tokens=40)[0].text)

Samples come from the serving engine, which is handed the weights as they are; nothing is written to disk for it.
"""

import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self
from uuid import uuid4

import numpy as np

from haori.core.errors import HaoriError, InputError, LibraryError
from haori.core.events import EventSink, discard
from haori.jobs.tenants.pool import TrainingPool
from haori.jobs.tenants.records import AdamParams, AdapterSpec, Datum, LossOutput
from haori.serve.request import Sampling, StreamChunk, TextRequest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from haori.bases import Base
    from haori.serve.engine.engine import TextEngine

__all__ = ["CustomLoss", "Sample", "TrainingClient", "training_client"]

_TENANT = "session"
_CACHE_BYTES = 512 << 20
_ADAPTER_BYTES = 1 << 30
_AT_ONCE = 64

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text to go on with, token ids, or the messages of a conversation."""

CustomLoss = Callable[[Sequence[Datum], "list[Tensor]"], "Tensor | tuple[Tensor, dict[str, float]]"]
"""Computes a scalar, and figures if it likes, from the rows and the log-probabilities of their targets."""


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        prompt: Token ids of the prompt.
        tokens: Those of the answer, the token that ended it included.
        logprobs: Of each token of the answer, in nats, before temperature.
        text: The answer without special tokens.
        ended: Whether the model ended it, rather than `max_tokens`.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    ended: bool

    def datum(self, advantage: float) -> Datum:
        """Return the row that reinforcement learning trains on: this advantage on every token of the answer."""
        whole = np.array([*self.prompt, *self.tokens])
        before = len(self.prompt) - 1
        logprobs = np.concatenate([np.zeros(before), self.logprobs]).astype(np.float32)
        advantages = np.concatenate([np.zeros(before), np.full(len(self.tokens), advantage)]).astype(np.float32)
        return Datum(whole[:-1], {"target_tokens": whole[1:], "logprobs": logprobs, "advantages": advantages})


class TrainingClient:
    """A training session of one adapter over one base, in this process.

    Args:
        base: A base's name, folder or hub id, or what `find_base` returned.
        spec: The adapter.
        dtype: Of the base: `auto`, `fp32`, `bf16` or `fp16`.
        on_event: Receives a line on what runs fused.

    Raises:
        BaseError: The base cannot be found, or trained so.
    """

    def __init__(
        self, base: "str | Base", spec: AdapterSpec, *, dtype: str = "auto", on_event: EventSink = discard
    ) -> None:
        from haori.bases import find_base

        self.base = find_base(base) if isinstance(base, str) else base
        self.spec = spec
        self._dtype = dtype
        self._pool = TrainingPool(self.base, dtype=dtype, on_event=on_event)
        self._engine: TextEngine | None = None
        self._sampled: str | None = None  # the snapshot that the engine holds; None where weights have changed since
        self._pool.create(_TENANT, spec).result()

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base's tokenizer."""
        from haori.bases import load_tokenizer

        return load_tokenizer(self.base)

    def tokens(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a text, or of messages with the beginning of the answer."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if prompt and isinstance(prompt[0], Mapping):
            messages: Any = list(prompt)
            found: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            return list(found)
        return [int(token) for token in prompt]  # type: ignore[arg-type]

    def datum(self, prompt: Prompt, answer: str | Sequence[int]) -> Datum:
        """Return a row for cross_entropy that trains on the answer alone; an answer as text gets an end token."""
        before = self.tokens(prompt)
        if isinstance(answer, str):
            ids: Any = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            answer = [*ids, self.tokenizer.eos_token_id]
        whole = np.array([*before, *answer])
        weights = (np.arange(1, len(whole)) >= len(before)).astype(np.float32)
        return Datum(whole[:-1], {"target_tokens": whole[1:], "weights": weights})

    def forward_backward(self, data: Sequence[Datum], loss: str = "cross_entropy", **config: float) -> LossOutput:
        """Add the gradients of a loss, summed over tokens, to those since the last step.

        Args:
            data: Rows.
            loss: cross_entropy, importance_sampling, ppo, cispo, gspo or dro.
            config: Settings of the loss, such as clip_high_threshold.

        Raises:
            HaoriError: A row, the loss or a setting cannot be used, or the loss is not finite; nothing was added.
        """
        return self._pool.forward_backward(_TENANT, data, loss, config).result()

    def forward(self, data: Sequence[Datum]) -> LossOutput:
        """Return the log-probabilities of the targets, which is all that rows need here."""
        return self._pool.forward_backward(_TENANT, data, "cross_entropy", forward_only=True).result()

    def forward_backward_custom(self, data: Sequence[Datum], loss: CustomLoss) -> dict[str, float]:
        """Add the gradients of any loss of the log-probabilities, at the cost of another forward.

        Args:
            data: Rows with `target_tokens`; the loss may read whatever else they hold.
            loss: Called with the rows and a tensor of log-probabilities for each; returns a scalar, and figures if it
                likes.

        Returns:
            The figures, with the loss as `loss:sum`.

        Raises:
            InputError: The loss returns no scalar that depends on the log-probabilities.
        """
        import torch

        logprobs = [torch.from_numpy(found.copy()).requires_grad_() for found in self.forward(data).logprobs]
        result = loss(data, logprobs)
        value, figures = result if isinstance(result, tuple) else (result, {})
        if not isinstance(value, torch.Tensor) or value.dim() or not value.requires_grad:
            raise InputError("The custom loss must return a scalar tensor computed from the log-probabilities.")
        value.backward()  # type: ignore[no-untyped-call]
        weights = [torch.zeros_like(one) if one.grad is None else -one.grad for one in logprobs]
        rows = [
            Datum(datum.tokens, {"target_tokens": datum.inputs["target_tokens"], "weights": weight.numpy()})
            for datum, weight in zip(data, weights, strict=True)
        ]
        self.forward_backward(rows)
        return {**figures, "loss:sum": float(value.detach())}

    def optim_step(self, learning_rate: float = 1e-4, **params: float) -> dict[str, float]:
        """Apply the gradients with AdamW; `params` are those of `AdamParams`. Returns their norm before clipping."""
        from pydantic import ValidationError

        try:
            made = AdamParams(learning_rate=learning_rate, **params)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"The setting {'.'.join(map(str, first['loc']))!r} of the step: {first['msg']}.") from None
        metrics = self._pool.optim_step(_TENANT, made).result()
        self._forget_snapshot()
        return metrics

    def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        max_tokens: int = 128,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> list[Sample]:
        """Return `n` answers to a prompt by the weights as they are now.

        Args:
            prompt: A text to go on with, token ids, or the messages of a conversation.
            n: Number of answers.
            max_tokens: Longest answer.
            temperature: 0 takes the likeliest token.
            seed: Makes the answers repeatable, each with a seed of its own counted from this one.

        Raises:
            HaoriError: The prompt cannot be answered.
        """
        engine, adapter = self._current_engine()
        ids = tuple(self.tokens(prompt))
        waiting: list[queue.SimpleQueue[StreamChunk]] = []
        found: list[Sample] = []
        for number in range(n):
            if len(waiting) == _AT_ONCE:
                found.append(_sample(ids, waiting.pop(0)))
            sampling = Sampling(
                max_tokens=max_tokens, temperature=temperature, seed=None if seed is None else seed + number, logprobs=0
            )
            chunks: queue.SimpleQueue[StreamChunk] = queue.SimpleQueue()
            engine.submit(TextRequest(uuid4().hex, ids, ((adapter, 1.0),), sampling), chunks.put)
            waiting.append(chunks)
        return found + [_sample(ids, chunks) for chunks in waiting]

    def save(self, folder: str | Path, *, optimizer: bool = True) -> Path:
        """Write PEFT files that stock PEFT loads, and the optimizer's state for `load`; the library takes them too."""
        return self._pool.save(_TENANT, Path(folder), optimizer=optimizer).result()

    def load(self, folder: str | Path, *, optimizer: bool = False) -> AdapterSpec:
        """Go on from what `save` wrote, or from the LoRA in any PEFT folder; returns the adapter's spec."""
        self.spec = self._pool.load(_TENANT, Path(folder), optimizer=optimizer).result()
        self._forget_snapshot()
        return self.spec

    def close(self) -> None:
        """Free the base and the engine."""
        self._pool.close()
        if self._engine is not None:
            self._engine.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _current_engine(self) -> "tuple[TextEngine, str]":
        from haori.serve import EngineLimits, open_engine

        if self._engine is None:
            number_format = "fp32" if self._dtype == "fp32" else "auto"
            limits = EngineLimits(context_length=self.base.context_length, adapter_bytes=_ADAPTER_BYTES)
            self._engine = open_engine(self.base, _no_files, limits, weights=number_format, cache_bytes=_CACHE_BYTES)
        if self._sampled is None:
            weights = self._pool.weights(_TENANT).result()
            self._engine.put_adapter(weights.id, weights)
            self._sampled = weights.id
        return self._engine, self._sampled

    def _forget_snapshot(self) -> None:
        if self._engine is not None and self._sampled is not None:
            self._engine.drop_adapter(self._sampled)
        self._sampled = None


def _sample(prompt: tuple[int, ...], chunks: "queue.SimpleQueue[StreamChunk]") -> Sample:
    """Gather an answer."""
    tokens: list[int] = []
    logprobs: list[float] = []
    text = ""
    while True:
        chunk = chunks.get()
        tokens += chunk.tokens
        logprobs += [one.logprob for one in chunk.logprobs]
        text += chunk.text
        if chunk.finish == "error":
            raise HaoriError(chunk.error or "The answer could not be computed.")
        if chunk.finish is not None:
            return Sample(prompt, tuple(tokens), tuple(logprobs), text, chunk.finish == "stop")


def training_client(
    base: "str | Base",
    rank: int = 16,
    *,
    alpha: float = 32.0,
    seed: int | None = None,
    train_mlp: bool = True,
    train_attn: bool = True,
    train_unembed: bool = False,
    dtype: str = "auto",
) -> TrainingClient:
    """Begin to train a LoRA over a base with a loop of one's own.

    Args:
        base: A base's name, folder or hub id.
        rank: Of every adapted module.
        alpha: The update is scaled by alpha / rank.
        seed: Of the adapter's start.
        train_mlp: Adapt the MLPs.
        train_attn: Adapt the attention projections.
        train_unembed: Adapt the output head.
        dtype: Of the base: `auto`, `fp32`, `bf16` or `fp16`.

    Raises:
        BaseError: The base cannot be found, or trained so.
        InputError: The adapter would train nothing.
    """
    spec = AdapterSpec(
        rank=rank, alpha=alpha, seed=seed, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed
    )
    return TrainingClient(base, spec, dtype=dtype)


def _no_files(adapter: str) -> NoReturn:
    raise LibraryError(f"The session has no adapter {adapter!r} any more.")
