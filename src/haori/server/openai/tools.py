"""The tools of a request: which there are, which may or must be called, and what follows for prompt and answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field

from haori.data import Message, PromptFormat, template_of
from haori.data.reasoning import reasoning_field
from haori.data.tool_prompt import Turn
from haori.data.tool_rows import tool_definition
from haori.server.errors import ApiError
from haori.server.openai.request_fields import RequestPart
from haori.server.tools import CallReader, ToolFormat, calls_grammar, format_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CallPlan", "Function", "FunctionChoice", "FunctionTool", "ToolUse", "prompt_of"]

_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(RequestPart):
    """A function that the model may call."""

    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of its arguments; none without.")
    strict: bool | None = Field(default=None, description="Keep its arguments to the schema, also where a call is not "
                                "certain.")  # fmt: skip


class FunctionTool(RequestPart):
    """A tool: a function of the client's."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"custom": ()}

    type: Literal["function"]
    function: Function


class FunctionName(RequestPart):
    """The function that must be called."""

    name: str


class FunctionChoice(RequestPart):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName

    @property
    def name(self) -> str:
        """Return its name."""
        return self.function.name


class NamedChoice(Protocol):
    """A choice of one function, in whatever form a route writes it."""

    @property
    def name(self) -> str:
        """Return its name."""


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | None
"""Whether to call: never, as it comes, certainly, or a certain function."""


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request.

    Attributes:
        functions: Those that the prompt lists.
        must: Whether the answer must be a call.
        only: The one function that must be called.
        several: Whether there may be several calls.
    """

    functions: tuple[Function, ...] = ()
    must: bool = False
    only: str | None = None
    several: bool = True

    @classmethod
    def of(cls, functions: Sequence[Function], choice: "ToolChoice", *, several: bool | None) -> "ToolUse":
        """Return what is asked for.

        Args:
            functions: All that are given.
            choice: As given; None for `auto`.
            several: As given.

        Raises:
            ApiError: A name comes twice, is not given, or a choice has nothing to choose from.
        """
        names = [function.name for function in functions]
        if twice := next((name for index, name in enumerate(names) if name in names[:index]), None):
            raise ApiError(400, f"'tools' has the function {twice!r} twice; names must differ.", param="tools")
        for function in functions:
            if (function.parameters or {}).get("type", "object") != "object":
                message = f"The parameters of {function.name!r} must be a schema of the type 'object'."
                raise ApiError(400, message, param="tools", code="invalid_value")
        only = None if choice is None or isinstance(choice, str) else choice.name
        if only is not None and only not in names:
            message = f"'tool_choice' names {only[:80]!r}, which is not among the tools: {', '.join(names) or 'none'}."
            raise ApiError(400, message, param="tool_choice", code="invalid_value")
        if choice == "required" and not functions:
            raise ApiError(400, "'tool_choice' is 'required', but there are no 'tools'.", param="tool_choice")
        if choice == "none":
            return cls()
        return cls(tuple(functions), only is not None or choice == "required", only, several is not False)

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """Return the functions as templates expect them."""
        return [tool_definition(each.name, each.description, each.parameters) for each in self.functions]


class CallPlan:
    """How the calls of an answer are written, kept to their form, and read.

    The form goes by the chat template that the model is spoken to with, which an adapter may have of its own; so it is
    known once `constraint` was asked for.

    Args:
        use: The tools.
        otherwise: Schema of an answer that is no call; None for any text.
    """

    def __init__(self, use: ToolUse, otherwise: Mapping[str, Any] | None = None) -> None:
        self.use = use
        self.otherwise = otherwise
        self._form: ToolFormat | None = None

    @property
    def form(self) -> ToolFormat:
        """Return how the model writes calls."""
        assert self._form is not None, "constraint() comes first"
        return self._form

    @property
    def compiles(self) -> bool:
        """Say whether there will be a grammar."""
        return self._kept

    def constraint(self, speech: PromptFormat) -> dict[str, Any]:
        """Return fields of `Sampling`: the grammar of the answer, and the marks of calls as part of the text.

        Raises:
            InputError: The template writes calls in a form that is not read, or a schema cannot be used.
        """
        tokenizer = speech.tokenizer
        self._form = format_of(tokenizer)
        special = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        shown = special.intersection(self.form.marker_tokens(tokenizer).values())
        return {"grammar": self._grammar(tokenizer), "shown_tokens": frozenset(shown)}

    def reader(self) -> CallReader:
        """Return what reads one answer."""
        names = {function.name for function in self._callable}
        return CallReader(self.form, names, kept=self._kept, most=None if self.use.several else 1)

    @property
    def _callable(self) -> list[Function]:
        only = self.use.only
        return [function for function in self.use.functions if only is None or function.name == only]

    @property
    def _kept(self) -> bool:
        """Say whether calls cannot but fit: where one is certain, or a function wants it, or all is kept to a form."""
        return self.use.must or self.otherwise is not None or any(function.strict for function in self.use.functions)

    def _grammar(self, tokenizer: "PreTrainedTokenizerBase") -> str | None:
        if not self._kept:
            return None
        several = self.use.several and self.use.only is None
        free: Mapping[str, Any] | Literal["text"] = (
            "text" if self.otherwise is None else (self.otherwise or {"type": "object"})
        )
        return calls_grammar(
            self.form, {function.name: self._schema(function) for function in self._callable}, tokenizer,
            several=several, otherwise=None if self.use.must else free,
        )  # fmt: skip

    def _schema(self, function: Function) -> dict[str, Any]:
        """Return what a function's arguments are kept to; an object at least."""
        if not (self.use.must or function.strict):
            return {"type": "object"}
        return _NOTHING if function.parameters is None else {"type": "object", **function.parameters}


def prompt_of(speech: PromptFormat, turns: Sequence[Turn], use: ToolUse) -> list[int]:
    """Return the ids of a prompt.

    Raises:
        ApiError: There is reasoning, and the template shows none.
        DataError: The template refuses the conversation, or leaves a part of it out.
    """
    thinking = next((index for index, turn in enumerate(turns) if "reasoning_content" in turn), None)
    if thinking is not None and reasoning_field(speech.tokenizer, template_of(speech.tokenizer)) is None:
        message = (
            f"'messages[{thinking}]' has reasoning, of which this model's chat template shows none; take it out, or "
            "write it into 'content'."
        )
        raise ApiError(400, message, param=f"messages[{thinking}]", code="unsupported_field")
    if use.functions or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
        return speech.tool_prompt(turns, use.definitions)
    return speech.prompt([_message(turn) for turn in turns])


def _message(turn: Turn) -> Message:
    message = Message(role=turn["role"], content=turn["content"])
    if "reasoning_content" in turn:
        message["reasoning_content"] = turn["reasoning_content"]
    return message
