"""One request under way: its tokens, and how many of them the model has read."""

from typing import TYPE_CHECKING

from haori.serve.answer_writer import AnswerWriter
from haori.serve.request import Deliver, Fault, Finish, TextRequest
from haori.serve.sampling.prompt_scores import PromptScores
from haori.serve.sampling.sampler import Choice, SamplerState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sequence"]


class Sequence:
    """A request with its state in the engine.

    Args:
        request: What was asked.
        deliver: Takes the stream chunks.
        sampler: Chooses its tokens.
        tokenizer: Turns them into text.
        longest: Most tokens of prompt and answer together.
        stop_tokens: Ids that end an answer and are no part of its text.
    """

    def __init__(
        self,
        request: TextRequest,
        deliver: Deliver,
        sampler: SamplerState,
        tokenizer: "PreTrainedTokenizerBase",
        longest: int,
        stop_tokens: frozenset[int],
    ) -> None:
        self.request = request
        self.sampler = sampler
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        wanted, tops = request.sampling.max_tokens, request.sampling.prompt_logprobs
        self.longest = longest if wanted is None else min(self.prompt_length + wanted, longest)
        self.scores = None if tops is None else PromptScores(request.prompt, tops, request.prompt_targets)
        self.slot: int | None = None  # in the runner's cache
        self.read = 0  # tokens whose keys and values are in the cache
        self.cached_tokens = 0
        self.waiting_since = 0.0  # by the monotonic clock
        self.prefix_cached = False
        self.ended = False
        self._writer = AnswerWriter(request, deliver, tokenizer, stop_tokens)

    @property
    def decoding(self) -> bool:
        """Say whether it decodes: all tokens but the newest are in the cache."""
        return self.read == len(self.tokens) - 1

    @property
    def scoring(self) -> bool:
        """Say whether log-probabilities of its prompt are wanted and not all computed yet."""
        return self.scores is not None and not self.scores.complete

    @property
    def generated(self) -> int:
        """Return the number of tokens of the answer."""
        return len(self.tokens) - self.prompt_length

    def take(self, choice: Choice) -> None:
        """Append a token, send what is certain of the text, and notice the end."""
        if choice.error is not None:
            self.finish("error", choice.error, choice.fault)
            return
        if self.longest == self.prompt_length:
            self._send("length")
            return
        writer = self._writer
        self.tokens.append(choice.token)
        writer.push(choice.token, choice.logprob)
        if self.sampler.ended or writer.stopped:
            self._send(writer.complete(cut_off=False))
        elif len(self.tokens) >= self.longest:
            self._send(writer.complete(cut_off=True))
        elif writer.text:
            self._send(None)

    def finish(self, reason: Finish, error: str | None = None, fault: Fault = "engine") -> None:
        """End before the answer is complete."""
        if not self.ended:
            self._writer.interrupt()
            self._send(reason, error, fault)

    def _send(self, finish: Finish | None, error: str | None = None, fault: Fault = "engine") -> None:
        self.ended = finish is not None
        scores = () if self.scores is None or self.scoring else self.scores.found
        self.scores = self.scores if self.scoring else None
        self._writer.send(finish, error, fault, self.cached_tokens, scores)
