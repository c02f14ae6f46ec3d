"""One answer while it is written: token ids from vLLM become the stream chunks that callers of any engine get."""

from typing import TYPE_CHECKING

from haori.core.errors import UnavailableError
from haori.serve.answer_writer import AnswerWriter
from haori.serve.request import Deliver, Fault, Finish, TextRequest
from haori.serve.vllm.wire import VllmChunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VllmAnswer"]


class VllmAnswer:
    """A request with what has come of its answer.

    Args:
        request: What was asked.
        deliver: Takes the stream chunks.
        tokenizer: Turns tokens into text.
        stop_tokens: Ids that end an answer and are no part of its text.

    Attributes:
        begun: Whether any token came, after which no other server can take over.
        cached_tokens: Prompt tokens that were found in the prefix cache.
    """

    def __init__(
        self,
        request: TextRequest,
        deliver: Deliver,
        tokenizer: "PreTrainedTokenizerBase",
        stop_tokens: frozenset[int],
    ) -> None:
        self.begun = False
        self.cached_tokens = 0
        self._writer = AnswerWriter(request, deliver, tokenizer, stop_tokens)
        self._finish: Finish | None = None  # why the answer ended, once it has

    @property
    def complete(self) -> bool:
        """Say whether the caller has all of it."""
        return self._writer.ended

    @property
    def stopped(self) -> bool:
        """Say whether nothing that vLLM still writes is wanted."""
        return self._writer.stopped

    def take(self, chunk: VllmChunk) -> None:
        """Pass on what a chunk adds. The last one waits for `end`, as the figures come after it.

        Raises:
            UnavailableError: vLLM gave the answer up.
        """
        if chunk.cached_tokens is not None:
            self.cached_tokens = chunk.cached_tokens
        writer = self._writer
        for index, token in enumerate(chunk.tokens):
            self.begun = True
            writer.push(token, chunk.logprobs[index] if index < len(chunk.logprobs) else None)
            if writer.stopped:
                self._finish = "stop"
                return
        if chunk.finish is None:
            if writer.text:
                writer.send(cached_tokens=self.cached_tokens)
        elif chunk.finish in ("stop", "length"):
            self._finish = writer.complete(cut_off=chunk.finish == "length")
        else:
            raise UnavailableError(f"The vLLM server gave the answer up ({chunk.finish}); ask again.")

    def end(self) -> None:
        """Send the last chunk.

        Raises:
            UnavailableError: The answer is not complete.
        """
        if self._finish is None:
            raise UnavailableError("The vLLM server ended before the answer was complete; ask again.")
        self._writer.send(self._finish, cached_tokens=self.cached_tokens)

    def fail(self, finish: Finish, error: str | None = None, fault: Fault = "engine") -> None:
        """End before the answer is complete."""
        if not self._writer.ended:
            self._writer.interrupt()
            self._writer.send(finish, error, fault, cached_tokens=self.cached_tokens)
