r"""From a conversation to token ids and labels, such that training sees exactly what inference will.

The text of `messages[:i]` with the generation prompt is what the model is given at inference; it must be a prefix of
the text of `messages[:i+1]`, and what follows up to the end-of-turn token is the answer. Prompt and answer are
tokenised apart, so the ids before the first trained token are those of the prompt, whatever the answer begins
with. White space that a template puts after the end-of-turn token is not trained. Labels come from places in the
text and never from token ids, so an end-of-turn token is trained also when it is the padding token too.

A template with `{% generation %}` blocks says itself what the assistant's text is. Tools, calls and results are
written as they are for a request. Knows nothing about files, datasets or models.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from haori.core.errors import DataError
from haori.data.control_tokens import ControlTokens, encode_marked, mark_control_tokens, special_texts
from haori.data.conversation import Conversation, Message
from haori.data.template import adds_bos, apply_template, for_template, template_of
from haori.data.tool_prompt import apart_for_template, shown_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "RenderedRow", "count_trained", "render_row", "render_row_prompt"]

IGNORED = -100
"""Label of a token without loss."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SEAM = 32  # characters of left context in which an answer is tokenised


class RenderedRow(NamedTuple):
    """Token ids with labels (`IGNORED` where there is no loss); the ids before `prompt_length` are the prompt.

    `texts_apart`: texts beside calls that the template shows only as turns of their own, so they are not trained.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    texts_apart: int = 0


class _Piece(NamedTuple):
    """A stretch of rendered text. `ends`: the end-of-sequence id follows, because the text has no end-of-turn."""

    text: str
    trained: bool
    ends: bool = False


def count_trained(labels: Sequence[int]) -> int:
    """Return how many tokens carry loss; the first token of a row is never predicted."""
    return sum(label != IGNORED for label in labels[1:])


def render_row(
    tokenizer: "PreTrainedTokenizerBase",
    row: Conversation,
    train_on: Literal["assistant", "all"] = "assistant",
    control_tokens: ControlTokens = "text",
) -> RenderedRow:
    """Return a row's ids and labels.

    With `assistant`, loss is on each answer that does not say `"loss": false`, end-of-turn token included; what
    follows the last such answer is left out. With `all`, and for plain text, it is on every token. Control tokens in
    messages are read as text, unless they are allowed; in plain text they are tokens.

    Raises:
        DataError: The template refuses the row, rewrites earlier turns, or lacks an end that can be learnt.
    """
    if row.text is not None:
        front = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        text: Sequence[int] = tokenizer(row.text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = [*front, *text, _eos(tokenizer, row)]
        return RenderedRow(whole, list(whole), 0)
    if train_on == "all" and any(m.get("loss") is False for m in row.messages):
        raise DataError(f"{row.origin}: a message says \"loss\": false, but data.train_on is 'all'; drop one of them.")
    row, texts_apart = _ready(tokenizer, row, control_tokens)
    by_mask = train_on == "assistant" and _GENERATION.search(template_of(tokenizer)) is not None
    pieces = _masked_pieces(tokenizer, row) if by_mask else _turn_pieces(tokenizer, row)
    ids: list[int] = []
    labels: list[int] = []
    prompt = 0
    for i, piece in enumerate(pieces):
        found = (
            encode_marked(tokenizer, piece.text) if i == 0 else _encode_after(tokenizer, pieces[i - 1].text, piece.text)
        )
        if piece.ends:
            found = [*found, _eos(tokenizer, row)]
        prompt = len(found) if i == 0 else prompt
        ids += found
        labels += found if piece.trained or train_on == "all" else [IGNORED] * len(found)
    return RenderedRow(ids, labels, prompt, texts_apart)


def render_row_prompt(
    tokenizer: "PreTrainedTokenizerBase", row: Conversation, end: int, control_tokens: ControlTokens = "text"
) -> list[int]:
    """Return the ids that the model is given at inference to answer the messages before `end`.

    Raises:
        DataError: The template refuses them.
    """
    messages = tuple(_marked(tokenizer, message, control_tokens) for message in row.messages)
    tools = tuple(mark_control_tokens(tokenizer, tool, control_tokens) for tool in row.tools)
    marked = replace(row, messages=messages, tools=tools)
    return encode_marked(tokenizer, _render_row_part(tokenizer, marked, end, generate=True))


def _ready(
    tokenizer: "PreTrainedTokenizerBase", row: Conversation, control_tokens: ControlTokens
) -> tuple[Conversation, int]:
    """Return the row with control tokens marked and its calls in turns that the template shows; and texts apart."""
    messages = [_marked(tokenizer, message, control_tokens) for message in row.messages]
    if not row.uses_tools:
        return replace(row, messages=tuple(messages)), 0
    tools = tuple(mark_control_tokens(tokenizer, tool, control_tokens) for tool in row.tools)
    try:
        turns, apart = apart_for_template(tokenizer, messages, tools)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from None
    return replace(row, messages=tuple(cast(Message, turn) for turn in turns), tools=tools), apart


def _marked(tokenizer: "PreTrainedTokenizerBase", message: Message, control_tokens: ControlTokens) -> Message:
    return cast(Message, mark_control_tokens(tokenizer, message, control_tokens))


def _turn_pieces(tokenizer: "PreTrainedTokenizerBase", row: Conversation) -> list[_Piece]:
    """Cut a row at each trained answer by rendering it turn by turn."""
    pieces: list[_Piece] = []
    done = ""  # text of the pieces so far
    for i, message in enumerate(row.messages):
        if message["role"] != "assistant" or message.get("loss") is False:
            continue
        prompt = _render_row_part(tokenizer, row, i, generate=True)
        full = _render_row_part(tokenizer, row, i + 1, generate=False)
        if not prompt.startswith(done):
            raise DataError(
                f"{row.origin}: the chat template of this base rewrites earlier turns of a conversation, so they "
                'cannot be trained in one row; say "loss": false in every answer but the last.'
            )
        if not full.startswith(prompt):
            raise DataError(
                f"{row.origin}: the chat template of this base renders a finished answer differently from the prompt "
                "that asks for it, so training would not match inference; use a base with another template."
            )
        answer, ends = _cut_answer(tokenizer, full[len(prompt) :], message["content"])
        pieces += [_Piece(prompt[len(done) :], trained=False), _Piece(answer, trained=True, ends=ends)]
        done = prompt + answer
    return pieces


def _masked_pieces(tokenizer: "PreTrainedTokenizerBase", row: Conversation) -> list[_Piece]:
    """Cut a row where the template's own generation blocks begin and end."""
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    text, blocks = _generation_blocks(tokenizer, row)
    wanted = [row.messages[i].get("loss") is not False for i in answers]
    if len(blocks) != len(answers):
        if row.uses_tools:  # calls are in no block
            return _turn_pieces(tokenizer, row)
        if not all(wanted) or not blocks:
            raise DataError(
                f"{row.origin}: the chat template marks {len(blocks)} stretches as the assistant's, but the row has "
                f'{len(answers)} answers, so "loss": false cannot be followed.'
            )
        wanted = [True] * len(blocks)
        answers = [answers[0]] * len(blocks)
    pieces: list[_Piece] = []
    done = 0
    for (start, end), is_wanted, answer in zip(blocks, wanted, answers, strict=True):
        if not is_wanted:
            continue
        begin = start
        if not pieces:  # what inference is given ends here, wherever the block begins
            prompt = _render_row_part(tokenizer, row, answer, generate=True)
            if not text.startswith(prompt):
                raise DataError(
                    f"{row.origin}: the chat template of this base rewrites earlier turns of a conversation, so "
                    "training would not match inference; use rows of one turn."
                )
            begin = len(prompt)
        tail = _end_of_turn(tokenizer, text[end:])
        found, ends = _cut_answer(tokenizer, text[begin : end + len(tail)], "")
        pieces += [_Piece(text[done:begin], trained=False), _Piece(found, trained=True, ends=ends)]
        done = begin + len(found)
    return pieces


def _cut_answer(tokenizer: "PreTrainedTokenizerBase", rendered: str, content: str) -> tuple[str, bool]:
    """Return the answer up to its end-of-turn token, and whether it has none, so that one must be added.

    White space after the end of turn is cut; the content's own is kept.
    """
    own = len(content) if rendered.startswith(content) else 0
    answer = rendered[:own] + rendered[own:].rstrip()
    return answer, not answer.endswith(special_texts(tokenizer))


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", rest: str) -> str:
    """Return the end-of-turn token, with white space before it, that `rest` begins with, or the empty string."""
    stripped = rest.lstrip()
    found = next((text for text in special_texts(tokenizer) if stripped.startswith(text)), None)
    # A beginning-of-sequence token there belongs to the next turn.
    if found is None or (found == tokenizer.bos_token and found != tokenizer.eos_token):
        return ""
    return rest[: len(rest) - len(stripped) + len(found)]


def _render_row_part(tokenizer: "PreTrainedTokenizerBase", row: Conversation, end: int, *, generate: bool) -> str:
    if end == 0:
        raise DataError(f"{row.origin}: the row begins with the assistant; put the user's message before it.")
    try:
        turns, tools = _shown(tokenizer, replace(row, messages=row.messages[:end]))
        return apply_template(tokenizer, turns, tools=tools, generate=generate)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from None


def _shown(
    tokenizer: "PreTrainedTokenizerBase", row: Conversation
) -> tuple[list[dict[str, Any]], Sequence[Mapping[str, Any]]]:
    """Return what the template is given: turns, and tools."""
    if row.uses_tools:
        return shown_turns(tokenizer, row.messages, row.tools)
    return for_template(tokenizer, row.messages), ()


def _generation_blocks(tokenizer: "PreTrainedTokenizerBase", row: Conversation) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    turns, tools = _shown(tokenizer, row)
    try:
        texts, blocks = render_jinja_template(
            conversations=[turns],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=template_of(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # noqa: BLE001 - a template is a program: it may raise anything
        raise DataError(f"{row.origin}: the chat template of this base refuses the conversation: {error}") from None
    return texts[0], [(int(start), int(end)) for start, end in blocks[0]]


def _encode_after(tokenizer: "PreTrainedTokenizerBase", before: str, text: str) -> list[int]:
    """Tokenise text that follows other text, without changing the ids of what is before.

    Some tokenizers put a space in front of a text that stands alone; tokenised with its left context it has none.
    When the two texts would share a token, it is tokenised alone.
    """
    context = before[-_SEAM:]
    left = encode_marked(tokenizer, context)
    joint = encode_marked(tokenizer, context + text)
    return joint[len(left) :] if joint[: len(left)] == left else encode_marked(tokenizer, text)


def _eos(tokenizer: "PreTrainedTokenizerBase", row: Conversation) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{row.origin}: neither the chat template nor the tokenizer of this base has an end-of-turn token, "
            "so the model could not learn to stop; use another base."
        )
    return int(tokenizer.eos_token_id)
