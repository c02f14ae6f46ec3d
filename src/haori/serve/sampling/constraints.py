"""Keeps an answer to a JSON schema or a grammar, with llguidance: which tokens may come next, at every step.

The tokenizer is read once, a schema or grammar is compiled once; each answer then has its own cheap matcher. One that
is too large, or takes too long to compile, is refused, and what it costs at a step is bounded. Knows nothing about how
tokens are chosen, nor about models.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from haori.core.errors import InputError, MissingExtraError
from haori.serve.request import Sampling
from haori.serve.sampling.grammar_trial import GrammarTrial

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

__all__ = ["Constraints", "Matcher", "json_rule"]

_COMPILED_SCHEMAS = 64
_LARGEST_BYTES = 128 << 10
_LARGEST_GBNF = 16 << 10  # translating takes a second, and four times as long for twice as much
_LEXER_STATES = 100_000  # one or two kilobytes each
_SPACE = r"[ \n\t]{1,32}"
"""Between the parts of the JSON: enough to indent it, and an end, for a model might go on with spaces for ever."""


class Constraints:
    """Compiles schemas and grammars for one tokenizer. May be used from several threads.

    Args:
        tokenizer: A fast transformers tokenizer.
        vocabulary: Width of the model's logits, which may be more than the tokenizer's.
        stop_tokens: Ids that end an answer; the tokenizer's end token if none is given.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None = None, stop_tokens: Iterable[int] = ()) -> None:
        self._source = tokenizer
        self._vocabulary = vocabulary or len(tokenizer)
        self._stop_tokens = sorted(stop_tokens) or [tokenizer.eos_token_id]
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._trial = GrammarTrial()
        self._compiled: OrderedDict[tuple[str, bool], LLMatcher | str] = OrderedDict()  # or why it is refused

    def compile(self, schema: dict[str, Any]) -> "Matcher":
        """Return a fresh matcher for answers that fit the schema; an empty schema allows any object.

        The first call reads the tokenizer if `read_tokenizer` has not.

        Raises:
            InputError: The schema is no JSON schema, asks for what cannot be kept to, fits nothing, is too large or
                takes too long; or the tokenizer is of a kind that cannot be constrained.
            MissingExtraError: llguidance is not installed.
        """
        try:
            text = json.dumps(schema or {"type": "object"}, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"The JSON schema cannot be written as JSON ({error}); give an object of plain values.") \
                from error  # fmt: skip
        return self._matcher(text, is_schema=True)

    def compile_grammar(self, grammar: str) -> "Matcher":
        """Return a fresh matcher for answers that fit a grammar in llguidance's form of Lark, or in GBNF.

        Raises:
            InputError: It is no such grammar, fits nothing, is too large or takes too long; or the tokenizer is of a
                kind that cannot be constrained.
            MissingExtraError: llguidance is not installed.
        """
        return self._matcher(grammar, is_schema=False)

    def of(self, sampling: Sampling) -> "Matcher":
        """Return a fresh matcher for what a request with a schema or a grammar is kept to.

        Raises:
            InputError: As for `compile` and `compile_grammar`.
            MissingExtraError: llguidance is not installed.
        """
        if sampling.grammar is not None:
            return self.compile_grammar(sampling.grammar)
        return self.compile(sampling.json_schema or {})

    def _matcher(self, text: str, *, is_schema: bool) -> "Matcher":
        if len(text.encode(errors="surrogatepass")) > _LARGEST_BYTES:
            raise InputError(
                f"The {_what(is_schema)} has more than {_LARGEST_BYTES:,} bytes, which is as many as are compiled; "
                "make it smaller."
            )
        key = text, is_schema
        with self._lock:
            found = self._compiled.get(key)
        if found is None:
            with self._reading:
                tokenizer = self._read_tokenizer()
            found = _compiled(tokenizer, text, self._trial, is_schema=is_schema)
        with self._lock:
            self._compiled[key] = found
            self._compiled.move_to_end(key)
            if len(self._compiled) > _COMPILED_SCHEMAS:
                self._compiled.popitem(last=False)
        if isinstance(found, str):
            raise InputError(found)
        return Matcher(found.deep_copy(), self._vocabulary)

    def read_tokenizer(self) -> None:
        """Read the tokenizer now. That takes a second, in which Python can do nothing else for half of it.

        Raises:
            InputError: It is of a kind that cannot be constrained.
            MissingExtraError: llguidance is not installed.
        """
        with self._reading:
            self._read_tokenizer()

    def close(self) -> None:
        """End the process that schemas and grammars are tried in."""
        self._trial.close()

    def _read_tokenizer(self) -> "LLTokenizer":
        if self._tokenizer is None:
            try:
                from llguidance.hf import from_tokenizer
            except ImportError as error:
                raise MissingExtraError(
                    "Answers that fit a JSON schema need llguidance, which is not installed; run "
                    "`pip install 'haori[structured]'`."
                ) from error
            width = max(self._vocabulary, len(self._source))
            try:
                self._tokenizer = from_tokenizer(self._source, n_vocab=width, eos_token=self._stop_tokens)
            except ValueError as error:
                raise InputError(
                    f"Answers of this model cannot be kept to a schema or grammar, for its tokenizer is of another "
                    f"kind ({_first_line(error)}); ask without one."
                ) from error
        return self._tokenizer


class Matcher:
    """The state of one answer within its schema or grammar."""

    def __init__(self, matcher: "LLMatcher", vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def finished(self) -> bool:
        """Say whether the answer is complete and nothing but an end token can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> "Tensor":
        """Return (V,) bool on the CPU: the tokens that may come next; end tokens where the answer may end.

        Raises:
            InputError: The schema turned out too complex to follow.
        """
        import numpy
        import torch

        bits = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        self._check()
        flags = numpy.unpackbits(bits, bitorder="little")[: self._vocabulary]
        return torch.from_numpy(flags).bool()

    def accept(self, token: int) -> None:
        """Advance by a token of the answer.

        Raises:
            InputError: The schema does not allow it here.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(
                f"The answer cannot be kept to its schema or grammar: {_first_line(self._matcher.get_error())}."
            )


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the part of a grammar that stands for JSON that fits a schema.

    Raises:
        InputError: The schema cannot be written as JSON.
    """
    try:
        # A schema may carry options of its own, of which one silently drops what is not supported.
        return "%json " + json.dumps(
            {**schema, "x-guidance": {"lenient": False, "whitespace_pattern": _SPACE}}, allow_nan=False
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"The JSON schema cannot be written as JSON ({error}); give an object of plain values.") \
            from error  # fmt: skip


def _what(is_schema: bool) -> str:
    return "JSON schema" if is_schema else "grammar, or schema of a tool,"


def _compiled(tokenizer: "LLTokenizer", text: str, trial: GrammarTrial, *, is_schema: bool) -> "LLMatcher | str":
    """Compile a schema or grammar, or say why not.

    A first step is taken too: that nothing fits a grammar may only show then.
    """
    from llguidance import LLMatcher, LLParserLimits

    what = _what(is_schema)
    try:
        # A schema may carry options of its own, of which one silently drops what is not supported.
        grammar = (
            LLMatcher.grammar_from_json_schema(text, overrides={"lenient": False, "whitespace_pattern": _SPACE})
            if is_schema
            else LLMatcher.grammar_from_lark(_lark(text))
        )
        if not trial.ends(grammar):
            return (
                f"This {what} takes longer than {trial.longest_s:g} s to compile, or too much memory; make it simpler: "
                "fewer patterns, alternatives and parts joined by 'allOf'."
            )
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(max_lexer_states=_LEXER_STATES))
        first = matcher.deep_copy()
        first.compute_bitmask()
        problem = _first_line(first.get_error()) if first.is_error() else ""
    except ValueError as error:
        problem = _first_line(error)
    if problem:
        return f"This {what} cannot be used ({problem}); change it, or ask without one."
    return matcher


def _lark(grammar: str) -> str:
    """Return a grammar as Lark; llama.cpp's form, GBNF, is translated.

    Raises:
        ValueError: It cannot be.
    """
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if "::=" not in grammar or is_lark_syntax(grammar):
        return grammar
    if len(grammar) > _LARGEST_GBNF:
        raise ValueError(f"it is GBNF of more than {_LARGEST_GBNF:,} characters; write it as Lark")
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # noqa: BLE001 - it raises that itself, and runs out of stack
        raise ValueError(f"as GBNF: {_first_line(error)}") from None


def _first_line(message: object) -> str:
    """Return the part of a parser's message that says what is wrong; its state may follow."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip()] or ["no reason given"]
    last = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])
    whole = f"{lines[0]} {last}" if lines[0].endswith(":") else lines[0]
    return whole.rstrip(".")
