"""The prompt format of an adapter: the template kept with its files, and what its recipe says.

An adapter that would be spoken to in other words than in training is refused: its answers would be worse, and nothing
would tell why.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import FileFormatError, InputError, MismatchError
from haori.core.hashing import hash_parts
from haori.core.records import AdapterCard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from haori.data import PromptFormat

__all__ = ["check_template", "joint_format", "prompt_format", "stored_template"]

_TEMPLATE_LIMIT_BYTES = 1 << 20


def prompt_format(tokenizer: "PreTrainedTokenizerBase", folder: Path, card: AdapterCard | None) -> "PromptFormat":
    """Return how an adapter is spoken to.

    Args:
        tokenizer: The base's; it stays as it is.
        folder: The adapter's files.
        card: Its card, where it has one.

    Raises:
        MismatchError: It was trained with another template than the one kept with it or, without one, the base's.
        FileFormatError: Its template cannot be read.
    """
    from haori.data import PromptFormat, template_hash, template_of

    check_template(folder, card, template_hash(tokenizer))
    template = stored_template(folder)
    if template is not None and template != template_of(tokenizer):
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    if card is None:
        return PromptFormat(tokenizer)
    return PromptFormat(tokenizer, (card.system,) if card.system else (), card.control_tokens)


def check_template(folder: Path, card: AdapterCard | None, of_base: str | None) -> None:
    """Refuse an adapter that would be given other prompts than in training.

    Args:
        folder: The adapter's files.
        card: Its card; one made elsewhere says nothing of its training.
        of_base: Hash of the base's template; None if that is not known.

    Raises:
        MismatchError: It is one.
        FileFormatError: Its template cannot be read.
    """
    template = stored_template(folder)
    used = of_base if template is None else hash_parts([template])
    if card is None or card.origin == "added" or None in (used, card.template_hash) or used == card.template_hash:
        return
    label = card.names[-1] if card.names else folder.name
    raise MismatchError(
        f"The adapter {label!r} was trained with another chat template than "
        f"{'the base has' if template is None else 'the one kept with it'}, so it would be given other prompts than in "
        "training; restore the file chat_template.jinja of its folder, or train it again."
    )


def joint_format(formats: Sequence["PromptFormat"]) -> "PromptFormat":
    """Return how several adapters at once are spoken to: as each of them is.

    Raises:
        InputError: They were trained with different templates.
    """
    from haori.data import PromptFormat, template_of

    first = formats[0]
    if any(template_of(other.tokenizer) != template_of(first.tokenizer) for other in formats[1:]):
        raise InputError(
            "The adapters asked for together were trained with different chat templates; ask for one of them."
        )
    systems = tuple(dict.fromkeys(system for other in formats for system in other.systems))
    allowed = all(other.control_tokens == "allow" for other in formats)
    return PromptFormat(first.tokenizer, systems, "allow" if allowed else "text")


def stored_template(folder: Path) -> str | None:
    """Return the chat template kept with an adapter, in either of the places where tokenizers put it.

    Raises:
        FileFormatError: It is too large, is no text, or there are several and none is named `default`.
    """
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        if plain.stat().st_size > _TEMPLATE_LIMIT_BYTES:
            raise FileFormatError(f"{plain.name!r} has more than {_TEMPLATE_LIMIT_BYTES:,} bytes; make it smaller.")
        try:
            return plain.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise FileFormatError(f"{plain.name!r} is not text in UTF-8; save it as that, or remove it.") from None
    config = folder / "tokenizer_config.json"
    if not config.is_file() or config.stat().st_size > _TEMPLATE_LIMIT_BYTES:
        return None
    try:
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError, RecursionError):
        return None
    if isinstance(template, list) and template:
        return _default_of(template)
    return template if isinstance(template, str) else None


def _default_of(named: Sequence[object]) -> str:
    """Return that of several templates which is used without tools or documents, as transformers does."""
    for entry in named:
        if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
            return str(entry["template"])
    raise FileFormatError(
        "'tokenizer_config.json' has several chat templates, and none is named 'default'; give one this name."
    )
