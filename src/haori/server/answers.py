"""The answers to one HTTP request: from its prompts to submitted engine requests to the chunks that arrive.

One request may want several answers (`n`, several prompts). They begin together or not at all, and whatever ends the
HTTP request (an error, a client that disconnects) ends those that still run, at once.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from haori.data import PromptFormat
from haori.serve.request import Finish, Sampling, StreamChunk, TextRequest, TokenLogprob
from haori.server.access import Caller
from haori.server.answer_streams import ChoiceChunk, ChunkQueue
from haori.server.contracts import Backend, Resolved
from haori.server.errors import ApiError, without_folders
from haori.server.flow import Flow
from haori.server.lifecycle import Service
from haori.server.metrics import AnswerMeter
from haori.server.request_note import RequestNote
from haori.server.token_records import TokenRecords

__all__ = ["Answer", "Answers", "Question"]

_STOPPED = "The server ended before the answer was complete; ask again."


@dataclass(frozen=True)
class Question:
    """What an HTTP request asks for.

    Attributes:
        id: Unique name; the engine's requests are called so with a number behind.
        model: The name as the client gave it.
        prompts: Returns the token ids of each prompt, given the prompt format of the model.
        sampling: How tokens are chosen.
        choices: Answers to each prompt.
        constraint: Returns fields of `Sampling` that depend on the prompt format.
        compiles: Whether a grammar is among them.
    """

    id: str
    model: str
    prompts: Callable[[PromptFormat], Sequence[Sequence[int]]]
    sampling: Sampling
    choices: int
    constraint: Callable[[PromptFormat], Mapping[str, Any]] | None = None
    compiles: bool = False


@dataclass
class Answer:
    """One answer, once it has ended."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: TokenRecords = field(default_factory=TokenRecords)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None


class Answers:
    """The answers to one question while they are written.

    Attributes:
        prompt_tokens: Tokens of all prompts, each counted once.
        generated_tokens: Tokens of all answers so far.
        cached_tokens: Prompt tokens that were found in the prefix cache, as far as is known.
    """

    def __init__(self, service: Service, backend: Backend, question: Question, note: RequestNote) -> None:
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.cached_tokens = 0
        self._service = service
        self._backend = backend
        self._question = question
        self._note = note
        self._queue = ChunkQueue(lambda: self._flow.regulate(self._queue.tokens))
        self._flow = Flow(backend.engine, lambda: list(self._running.values()), self._give_up)
        self._running: dict[int, str] = {}
        self._meters: list[AnswerMeter] = []
        self._grant = service.quotas.open(None, 0)

    @property
    def count(self) -> int:
        """Return the number of answers."""
        return len(self._meters)

    async def begin(self, caller: Caller) -> None:
        """Resolve the model, make the prompts and submit them.

        Raises:
            ApiError: The caller may not use the model, or a limit is passed.
            HaoriError: The engine or the directory refuses.
        """
        self._note.model = self._question.model
        caller.check(self._question.model, self._backend.engine.base.name)
        self._service.quotas.check(caller.key)
        sampling = self._question.sampling
        job = self._service.preparation.run(
            caller.owner, lambda: self._submit(caller),
            compiles=self._question.compiles or sampling.json_schema is not None or sampling.grammar is not None,
        )  # fmt: skip
        try:
            await asyncio.shield(job)
        except asyncio.CancelledError:
            job.add_done_callback(self._abandon)
            raise
        self._flow.begin(self.count)

    async def chunks(self) -> AsyncIterator[ChoiceChunk]:
        """Yield the chunks of all answers as they come, until each has ended.

        Raises:
            ApiError: The engine failed (500), refuses what was asked for (400), or is closed or out of reach (503).
        """
        while self._running:
            entry = await self._queue.get()
            self._record(entry)
            yield entry

    async def whole(self) -> list[Answer]:
        """Wait for all answers.

        Raises:
            ApiError: As for `chunks`.
        """
        answers = [Answer() for _ in range(self.count)]
        texts: list[list[str]] = [[] for _ in answers]
        async for index, chunk in self.chunks():
            answer = answers[index]
            texts[index].append(chunk.text)
            answer.tokens += chunk.tokens
            answer.logprobs.extend(chunk.logprobs)
            answer.prompt_logprobs += chunk.prompt_logprobs
            answer.finish = chunk.finish
        for answer, parts in zip(answers, texts, strict=True):
            answer.text = "".join(parts)
        return answers

    def close(self) -> None:
        """End what still runs."""
        running, self._running = dict(self._running), {}
        for index, identity in running.items():
            self._backend.engine.cancel(identity)
            self._meters[index].observe(StreamChunk(finish="cancelled"))
            self._note.finish = self._note.finish or "cancelled"
        self._grant.close()
        self._flow.close()
        if self.generated_tokens and self._question.sampling.logprobs is not None:
            self._service.memory.used(self.generated_tokens)

    def _give_up(self, sentence: str) -> None:
        """End what still runs with an error, which is the next chunk that is read."""
        running = dict(self._running)
        for identity in running.values():
            self._backend.engine.cancel(identity)
        self._queue.clear()
        for index in running:
            self._queue.put(ChoiceChunk(index, StreamChunk(finish="error", error=sentence, fault="request")))

    def _submit(self, caller: Caller) -> None:
        """Run on a preparing thread."""
        question, engine = self._question, self._backend.engine
        resolved = caller.resolve(self._backend.directory, question.model, engine.base.name)
        self._note.serves = resolved.label
        self._note.adapters = tuple(dict.fromkeys(identity for identity, _ in resolved.mix))
        with self._service.preparation.tokenizing:
            speech = self._backend.directory.prompt_format(engine.tokenizer, resolved.mix)
            prompts = question.prompts(speech)
            more = {} if question.constraint is None else question.constraint(speech)
        sampling = question.sampling.model_copy(update=more)
        self._check(prompts)
        self._grant = self._service.quotas.open(caller.key, len(prompts) * question.choices)
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._note.prompt_tokens = self.prompt_tokens
        self._note.generated_tokens = 0
        try:
            self._grant.spend(self.prompt_tokens)
            for prompt in prompts:
                for choice in range(question.choices):
                    self._submit_one(prompt, sampling, choice, resolved, caller)
        except BaseException:
            self.close()
            raise

    def _submit_one(
        self, prompt: Sequence[int], sampling: Sampling, choice: int, resolved: Resolved, caller: Caller
    ) -> None:
        question, engine = self._question, self._backend.engine
        index = len(self._meters)
        if sampling.seed is not None and choice:
            sampling = sampling.model_copy(update={"seed": _other_seed(sampling.seed, choice)})
        identity = f"{question.id}-{index}"
        # A client that varies strengths fills many queues, but with keys it gets one turn: owners take turns first.
        request = TextRequest(identity, tuple(prompt), resolved.mix, sampling, question.model, caller.owner)
        engine.submit(request, self._service.streams.sender(self._queue, index))
        self._meters.append(self._service.meters.begin(resolved.names, len(prompt)))
        self._running[index] = identity

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Refuse prompts that are over the limits."""
        settings = self._service.settings
        wanted = len(prompts) * self._question.choices
        if wanted > settings.max_answers:
            message = f"{wanted} answers were asked for; one request may have {settings.max_answers}."
            raise ApiError(400, message, param="n", code="invalid_value")
        longest = max(len(prompt) for prompt in prompts)
        room = self._backend.engine.context_length - 1  # one for the answer
        allowed = min(settings.max_prompt_tokens or room, room)
        if longest > allowed:
            message = f"The prompt has {longest} tokens; at most {allowed} are allowed. Shorten it."
            raise ApiError(400, message, code="context_length_exceeded")

    def _record(self, entry: ChoiceChunk) -> None:
        """Count a chunk; an answer that failed ends them all."""
        chunk = entry.chunk
        self._meters[entry.choice].observe(chunk)
        if chunk.tokens:
            if self._note.first_token_s is None:
                self._note.first_token_s = time.perf_counter()
            self._grant.spend(len(chunk.tokens))
            self.generated_tokens += len(chunk.tokens)
            self._note.generated_tokens = self.generated_tokens
        if chunk.finish is None:
            return
        del self._running[entry.choice]
        if not self._running:
            self._grant.close()
        self.cached_tokens += chunk.cached_tokens
        self._note.cached_tokens = self.cached_tokens
        self._note.finish = chunk.finish
        if chunk.finish == "error":
            error = _error(chunk)
            if error.message != chunk.error:
                self._note.error = chunk.error
            raise error
        if chunk.finish == "cancelled":
            raise ApiError(503, _STOPPED, code="draining", retry_after_s=1.0)

    def _abandon(self, job: "asyncio.Future[None]") -> None:
        if not job.cancelled():
            job.exception()  # retrieved, so that asyncio does not log it: the client has gone
        self.close()


def _error(chunk: StreamChunk) -> ApiError:
    """Return the reply to an answer that failed."""
    sentence = without_folders(chunk.error or "The engine failed.")
    if chunk.fault == "request":
        return ApiError(400, sentence, code="not_served")
    if chunk.fault == "outage":
        return ApiError(503, sentence, code="engine_unavailable", retry_after_s=1.0)
    return ApiError(500, sentence, code="engine_error")


def _other_seed(seed: int, choice: int) -> int:
    """Return the seed of a further choice, so that choices differ and are repeatable; it stays within 64 bits."""
    return (seed + choice + 2**63) % 2**64 - 2**63
