"""Chat templates: which one a tokenizer has, and the prompt that it makes of messages.

A tokenizer without a template gets `PLAIN_TEMPLATE`. Knows nothing about rows, tools or models.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError
from haori.core.hashing import hash_parts
from haori.data.control_tokens import ControlTokens, encode_marked, mark_control_tokens
from haori.data.conversation import Message
from haori.data.reasoning import reasoning_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "PLAIN_TEMPLATE",
    "adds_bos",
    "apply_template",
    "for_template",
    "render_prompt",
    "template_hash",
    "template_of",
    "tokenizer_hash",
]

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% else %}{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""For tokenizers without a chat template; `{{ bos_token }}` is put in front where the tokenizer itself would."""


def template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the chat template that is used with this tokenizer.

    Raises:
        DataError: The tokenizer has several templates and none is named `default`.
    """
    if tokenizer.chat_template is None:
        return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + PLAIN_TEMPLATE
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise DataError(f"The tokenizer has the chat templates {names}, and none is named 'default'.") from None


def template_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the hash of the template that is used with this tokenizer; that of a fingerprint, where it has one."""
    return hash_parts([template_of(tokenizer)])


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the hash of the tokenizer's vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hash_parts([type(tokenizer).__name__, rules, json.dumps(tokenizer.special_tokens_map, default=str)])


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], control_tokens: ControlTokens = "text"
) -> list[int]:
    """Return the ids that the model is given at inference: they end where the assistant's answer begins.

    Control tokens in the messages are read as text, unless they are allowed.

    Raises:
        DataError: The template refuses these messages.
    """
    marked = [mark_control_tokens(tokenizer, message, control_tokens) for message in messages]
    return encode_marked(tokenizer, apply_template(tokenizer, for_template(tokenizer, marked)))


def apply_template(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    generate: bool = True,
) -> str:
    """Return the text of turns, which may have more parts than `Message` has; a template ignores what it does not know.

    Raises:
        DataError: The template refuses them.
    """
    template = template_of(tokenizer)
    if tokenizer.chat_template is None and tokenizer.eos_token is None:
        raise DataError("The tokenizer has neither a chat template nor an end-of-sequence token; use another base.")
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], tools=[dict(tool) for tool in tools] or None,
                chat_template=template, tokenize=False, add_generation_prompt=generate,
            )
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - a template is a program: it may raise anything
        raise DataError(f"The chat template of this base refuses the conversation: {error}") from None


def for_template(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return turns as the template reads them: without flags, reasoning under the name that it knows, or left out."""
    plain = [{name: part for name, part in turn.items() if name not in {"loss", "reasoning_content"}} for turn in turns]
    if any("reasoning_content" in turn for turn in turns):
        name = reasoning_field(tokenizer, template_of(tokenizer))
        for shown, turn in zip(plain, turns, strict=True):
            if name is not None and "reasoning_content" in turn:
                shown[name] = turn["reasoning_content"]
    return plain


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Say whether the tokenizer puts a beginning-of-sequence token before plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]
