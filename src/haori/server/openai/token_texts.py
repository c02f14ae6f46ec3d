"""Log-probabilities in the forms of the routes, with tokens as text and as bytes: one may be part of a character."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from haori.bases.detokenise import vocabulary_of
from haori.serve.request import TokenLogprob
from haori.server.openai.plain_prompts import EchoedPrompt
from haori.server.openai.replies import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, PromptLogprob, TopLogprob

__all__ = ["TokenTexts"]

_LEAST = -9999.0  # JSON has no infinity; OpenAI says this for a token that cannot come


class TokenTexts:
    """Writes log-probabilities with the tokens of one tokenizer.

    Attributes:
        bytes_of: Returns the bytes that a token stands for.
        text_of: Returns its text; that of one which is no whole character is written as its bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self.bytes_of = vocabulary.bytes_alone
        self.text_of = vocabulary.text_alone

    def chat(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        """Return log-probabilities in the form of chat completions."""
        return ChatLogprobs(content=[self._chat_token(found) for found in logprobs])

    def chat_items(self, logprobs: Iterable[TokenLogprob]) -> Iterator[dict[str, Any]]:
        """Yield what `chat` lists, token by token."""
        return (self._chat_token(found).model_dump() for found in logprobs)

    def plain(self, logprobs: Iterable[TokenLogprob], *, tops: int, offset: int) -> CompletionLogprobs:
        """Return log-probabilities in the form of plain completions; `offset` counts characters before them."""
        tokens = [self.text_of(found.token) for found in logprobs]
        offsets = []
        for text in tokens:
            offsets.append(offset)
            offset += len(text)
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[max(found.logprob, _LEAST) for found in logprobs],
            top_logprobs=[self._tops(found, tops) for found in logprobs] if tops else None,
            text_offset=offsets,
        )

    def echoed(self, prompt: EchoedPrompt, logprobs: Sequence[TokenLogprob], *, tops: int) -> CompletionLogprobs:
        """Return the same of a prompt; of its first token nothing is known."""
        return CompletionLogprobs(
            tokens=[self.text_of(token) for token in prompt.ids],
            token_logprobs=[None, *(max(found.logprob, _LEAST) for found in logprobs)],
            top_logprobs=[None, *(self._tops(found, tops) for found in logprobs)] if tops else None,
            text_offset=list(prompt.offsets),
        )

    def prompt(self, logprobs: Sequence[TokenLogprob], *, tops: int) -> list[dict[str, PromptLogprob] | None]:
        """Return log-probabilities of a prompt in vLLM's form: by token id, the prompt's own token first."""
        positions: list[dict[str, PromptLogprob] | None] = [None]
        for found in logprobs:
            at = {found.token: (found.logprob, found.rank)}
            for rank, (token, value) in enumerate(found.top[:tops], start=1):
                at.setdefault(token, (value, rank))
            positions.append({
                str(token): PromptLogprob(
                    logprob=max(value, _LEAST), rank=rank, decoded_token=self.text_of(token)
                )
                for token, (value, rank) in at.items()
            })  # fmt: skip
        return positions

    def _tops(self, found: TokenLogprob, tops: int) -> dict[str, float]:
        """Return the likeliest tokens by text, and the one that stands there; of equal texts, the likeliest."""
        at: dict[str, float] = {}
        for token, value in [*found.top[:tops], (found.token, found.logprob)]:
            text = self.text_of(token)
            at[text] = max(value, at.get(text, _LEAST))
        return at

    def plain_items(self, logprobs: Iterable[TokenLogprob], *, tops: int) -> dict[str, Any]:
        """Return what `plain` says, with an iterator for each list."""
        return {
            "tokens": (self.text_of(found.token) for found in logprobs),
            "token_logprobs": (max(found.logprob, _LEAST) for found in logprobs),
            "top_logprobs": (self._tops(found, tops) for found in logprobs) if tops else None,
            "text_offset": self._offsets(logprobs),
        }

    def _offsets(self, logprobs: Iterable[TokenLogprob]) -> Iterator[int]:
        offset = 0
        for found in logprobs:
            yield offset
            offset += len(self.text_of(found.token))

    def _chat_token(self, found: TokenLogprob) -> ChatTokenLogprob:
        return ChatTokenLogprob(
            **self._one(found.token, found.logprob).model_dump(),
            top_logprobs=[self._one(token, value) for token, value in found.top],
        )

    def _one(self, token: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=self.text_of(token), logprob=max(logprob, _LEAST), bytes=list(self.bytes_of(token)))
