"""Turns the tokens of one answer into stream chunks. Every engine that makes tokens writes its answers with this."""

from contextlib import suppress
from typing import TYPE_CHECKING

from haori.bases.detokenise import TextStream
from haori.serve.request import Deliver, Fault, Finish, StreamChunk, TextRequest, TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["AnswerWriter"]


class AnswerWriter:
    """Collects tokens and their text until a chunk is sent.

    Args:
        request: What was asked.
        deliver: Takes the stream chunks.
        tokenizer: Turns tokens into text.
        stop_tokens: Ids that end an answer and are no part of its text.

    Attributes:
        text: Text that is not sent yet.
        stopped: Whether a stop string occurred, so that no further token is wanted.
        ended: Whether the last chunk was sent.
    """

    def __init__(
        self,
        request: TextRequest,
        deliver: Deliver,
        tokenizer: "PreTrainedTokenizerBase",
        stop_tokens: frozenset[int],
    ) -> None:
        self.text = ""
        self.stopped = False
        self.ended = False
        self._deliver = deliver
        self._stop_tokens = frozenset() if request.sampling.ignore_eos else stop_tokens
        self._stream = TextStream(tokenizer, request.sampling.stop, request.sampling.shown_tokens)
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Add a token."""
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if token not in self._stop_tokens:
            self.text += self._stream.push(token)
            self.stopped = self._stream.stopped

    def send(
        self,
        finish: Finish | None = None,
        error: str | None = None,
        fault: Fault = "engine",
        cached_tokens: int = 0,
        prompt_logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        """Send what was added since the last chunk; the fields are those of `StreamChunk`."""
        self.ended = finish is not None
        chunk = StreamChunk(
            self.text, tuple(self._tokens), tuple(self._logprobs), finish, error, cached_tokens, fault, prompt_logprobs
        )
        self.text, self._tokens, self._logprobs = "", [], []
        self._deliver(chunk)

    def complete(self, *, cut_off: bool) -> Finish:
        """Add the text that was held back, and return why the answer ended.

        Args:
            cut_off: Whether the model had not ended its answer; a stop string in the rest of the text ends it too.
        """
        self.text += self._stream.finish()
        self.stopped = self._stream.stopped
        return "length" if cut_off and not self.stopped else "stop"

    def interrupt(self) -> None:
        """Add the text that was held back, as far as it can be had: the answer ends early, whatever the reason."""
        with suppress(BaseException):
            self.text += self._stream.finish()
