r"""From a conversation to token ids and labels, such that training sees exactly what inference will.

The text of `messages[:i]` with the generation prompt is what the model is given at inference; it must be a prefix of
the text of `messages[:i+1]`, and what follows up to the end-of-turn token is the answer. Prompt and answer are
tokenised apart, so the ids before the first trained token are those of `render_prompt`, whatever the answer begins
with. White space that a template puts after the end-of-turn token is not trained. Labels come from places in the
text and never from token ids, so an end-of-turn token is trained also when it is the padding token too.

A template with `{% generation %}` blocks says itself what the assistant's text is. A tokenizer without a template
gets `PLAIN_TEMPLATE`. Knows nothing about files, datasets or models.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from haori.core.errors import DataError
from haori.core.hashing import hash_parts
from haori.data.control_tokens import ControlTokens, encode_marked, mark_control_tokens, special_texts
from haori.data.conversation import Conversation, Message
from haori.data.reasoning import reasoning_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "PLAIN_TEMPLATE",
    "RenderedRow",
    "apply_template",
    "count_trained",
    "render_prompt",
    "render_row",
    "template_hash",
    "template_of",
]

IGNORED = -100
"""Label of a token without loss."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% else %}{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""For tokenizers without a chat template; `{{ bos_token }}` is put in front where the tokenizer itself would."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SEAM = 32  # characters of left context in which an answer is tokenised


class RenderedRow(NamedTuple):
    """Token ids with labels (`IGNORED` where there is no loss); the ids before `prompt_length` are the prompt."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int


class _Piece(NamedTuple):
    """A stretch of rendered text. `ends`: the end-of-sequence id follows, because the text has no end-of-turn."""

    text: str
    trained: bool
    ends: bool = False


def template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the chat template that is used with this tokenizer.

    Raises:
        DataError: The tokenizer has several templates and none is named `default`.
    """
    if tokenizer.chat_template is None:
        return ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + PLAIN_TEMPLATE
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise DataError(f"The tokenizer has the chat templates {names}, and none is named 'default'.") from None


def template_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the hash of the template that is used with this tokenizer; that of a fingerprint, where it has one."""
    return hash_parts([template_of(tokenizer)])


def count_trained(labels: Sequence[int]) -> int:
    """Return how many tokens carry loss; the first token of a row is never predicted."""
    return sum(label != IGNORED for label in labels[1:])


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], control_tokens: ControlTokens = "text"
) -> list[int]:
    """Return the ids that the model is given at inference: they end where the assistant's answer begins.

    Control tokens in the messages are read as text, unless they are allowed.

    Raises:
        DataError: The template refuses these messages.
    """
    marked = [_marked(tokenizer, message, control_tokens) for message in messages]
    return encode_marked(tokenizer, _render(tokenizer, marked, generate=True))


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
        front = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
        text: Sequence[int] = tokenizer(row.text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = [*front, *text, _eos(tokenizer, row)]
        return RenderedRow(whole, list(whole), 0)
    if train_on == "all" and any(m.get("loss") is False for m in row.messages):
        raise DataError(f"{row.origin}: a message says \"loss\": false, but data.train_on is 'all'; drop one of them.")
    row = replace(row, messages=tuple(_marked(tokenizer, message, control_tokens) for message in row.messages))
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
    return RenderedRow(ids, labels, prompt)


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


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, generate: bool) -> str:
    return apply_template(tokenizer, _plain(tokenizer, template_of(tokenizer), messages), generate=generate)


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


def _plain(tokenizer: "PreTrainedTokenizerBase", template: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as the template reads them; reasoning under the name that it knows, or left out."""
    plain: list[dict[str, Any]] = [{"role": m["role"], "content": m["content"]} for m in messages]
    if any("reasoning_content" in m for m in messages) and (name := reasoning_field(tokenizer, template)) is not None:
        for message, given in zip(plain, messages, strict=True):
            if "reasoning_content" in given:
                message[name] = given["reasoning_content"]
    return plain


def _render_row_part(tokenizer: "PreTrainedTokenizerBase", row: Conversation, end: int, *, generate: bool) -> str:
    if end == 0:
        raise DataError(f"{row.origin}: the row begins with the assistant; put the user's message before it.")
    try:
        return _render(tokenizer, row.messages[:end], generate=generate)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from None


def _generation_blocks(tokenizer: "PreTrainedTokenizerBase", row: Conversation) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    plain = _plain(tokenizer, template_of(tokenizer), row.messages)
    try:
        texts, blocks = render_jinja_template(
            conversations=[plain],
            chat_template=template_of(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # noqa: BLE001 - a template is a program: it may raise anything
        raise DataError(f"{row.origin}: the chat template of this base refuses the conversation: {error}") from None
    return texts[0], [(int(start), int(end)) for start, end in blocks[0]]


def _marked(tokenizer: "PreTrainedTokenizerBase", message: Message, control_tokens: ControlTokens) -> Message:
    return cast(Message, mark_control_tokens(tokenizer, message, control_tokens))


def _encode_after(tokenizer: "PreTrainedTokenizerBase", before: str, text: str) -> list[int]:
    """Tokenise text that follows other text, without changing the ids of what is before.

    Some tokenizers put a space in front of a text that stands alone; tokenised with its left context it has none.
    When the two texts would share a token, it is tokenised alone.
    """
    context = before[-_SEAM:]
    left = encode_marked(tokenizer, context)
    joint = encode_marked(tokenizer, context + text)
    return joint[len(left) :] if joint[: len(left)] == left else encode_marked(tokenizer, text)


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Say whether the tokenizer puts a beginning-of-sequence token before plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]


def _eos(tokenizer: "PreTrainedTokenizerBase", row: Conversation) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{row.origin}: neither the chat template nor the tokenizer of this base has an end-of-turn token, "
            "so the model could not learn to stop; use another base."
        )
    return int(tokenizer.eos_token_id)
