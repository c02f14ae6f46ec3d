"""One answer in the making: token ids from vLLM become the pieces that callers of any engine get."""

from contextlib import suppress
from typing import TYPE_CHECKING

from haori.core.errors import UnavailableError
from haori.serve.detokenise import TextStream
from haori.serve.request import Deliver, Fault, Finish, StreamChunk, TextRequest, TokenLogprob
from haori.serve.vllm.wire import VllmChunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VllmAnswer"]


class VllmAnswer:
    """A request with what has come of its answer.

    Args:
        request: What was asked.
        deliver: Takes the pieces.
        tokenizer: Turns tokens into text.
        stop_tokens: Ids that end an answer and are no part of its text.

    Attributes:
        begun: Whether any token came, after which no other server can take over.
        complete: Whether the caller has all of it.
        cached_tokens: Prompt tokens that were found in the prefix cache.
    """

    def __init__(
        self,
        request: TextRequest,
        deliver: Deliver,
        tokenizer: "PreTrainedTokenizerBase",
        stop_tokens: frozenset[int],
    ) -> None:
        self.request = request
        self.begun = False
        self.complete = False
        self.cached_tokens = 0
        self._deliver = deliver
        self._stop_tokens = frozenset() if request.sampling.ignore_eos else stop_tokens
        self._text = TextStream(tokenizer, request.sampling.stop, request.sampling.shown_tokens)
        self._held: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._rest: tuple[str, Finish] | None = None  # the last text, and why the answer ended

    @property
    def stopped(self) -> bool:
        """Say whether nothing that vLLM still writes is wanted."""
        return self._text.stopped

    def take(self, chunk: VllmChunk) -> None:
        """Pass on what a chunk adds. The last piece waits for `end`, as the figures come after it.

        Raises:
            UnavailableError: vLLM gave the answer up.
        """
        if chunk.cached_tokens is not None:
            self.cached_tokens = chunk.cached_tokens
        text = ""
        for index, token in enumerate(chunk.tokens):
            self.begun = True
            self._held.append(token)
            self._logprobs += chunk.logprobs[index : index + 1]
            text += "" if token in self._stop_tokens else self._text.push(token)
            if self._text.stopped:
                self._rest = text, "stop"
                return
        if chunk.finish is None:
            if text:
                self._send(text)
        elif chunk.finish in ("stop", "length"):
            text += self._text.finish()
            self._rest = text, "length" if chunk.finish == "length" and not self._text.stopped else "stop"
        else:
            raise UnavailableError(f"The vLLM server gave the answer up ({chunk.finish}); ask again.")

    def end(self) -> None:
        """Hand out the last piece.

        Raises:
            UnavailableError: The answer is not complete.
        """
        if self._rest is None:
            raise UnavailableError("The vLLM server ended before the answer was complete; ask again.")
        self._send(*self._rest)

    def fail(self, finish: Finish, error: str | None = None, fault: Fault = "engine") -> None:
        """End before the answer is complete."""
        if self.complete:
            return
        text = ""
        with suppress(BaseException):  # the end is told whatever becomes of the rest
            text = self._text.finish()
        self._send(text, finish, error, fault)

    def _send(self, text: str, finish: Finish | None = None, error: str | None = None, fault: Fault = "engine") -> None:
        self.complete = finish is not None
        chunk = StreamChunk(text, tuple(self._held), tuple(self._logprobs), finish, error, self.cached_tokens, fault)
        self._held, self._logprobs = [], []
        self._deliver(chunk)
