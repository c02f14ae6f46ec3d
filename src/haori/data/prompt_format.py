"""How a model is spoken to: chat template, system message and reading of control tokens, as in its training.

Whoever talks to an adapter (the terminal, the server, an evaluation) asks its format for the prompt, so that all give
the model what it saw in training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haori.core.errors import InputError
from haori.data.control_tokens import ControlTokens
from haori.data.conversation import Message
from haori.data.template import render_prompt
from haori.data.tool_prompt import render_tool_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptFormat"]


@dataclass(frozen=True)
class PromptFormat:
    """A way to write prompts.

    Attributes:
        tokenizer: With the chat template.
        systems: System message of conversations that bring none; several, of adapters at once, cannot be put together.
        control_tokens: Whether control tokens in messages are read as text.
    """

    tokenizer: "PreTrainedTokenizerBase"
    systems: tuple[str, ...] = ()
    control_tokens: ControlTokens = "text"

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the prompt for a conversation.

        Raises:
            DataError: The template refuses it.
            InputError: It brings no system message, and there are several.
        """
        return render_prompt(self.tokenizer, self._with_system(messages), self.control_tokens)

    def tool_prompt(self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of a prompt with tools, calls or results in it; see `render_tool_prompt`.

        Raises:
            DataError: The template refuses the conversation, or leaves a part of it out.
            InputError: It brings no system message, and there are several.
        """
        return render_tool_prompt(self.tokenizer, self._with_system(turns), tools, self.control_tokens)

    def _with_system(self, turns: Sequence[Any]) -> list[Any]:
        if not self.systems or any(turn["role"] == "system" for turn in turns):
            return list(turns)
        if len(self.systems) > 1:
            raise InputError(
                "The adapters asked for together were trained with different system messages; give one in the request."
            )
        return [{"role": "system", "content": self.systems[0]}, *turns]
