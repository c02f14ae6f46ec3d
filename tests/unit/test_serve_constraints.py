"""Answers kept to a JSON schema: whatever the model prefers, what comes out fits, and ends."""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from haori.core.errors import InputError, MissingExtraError
from haori.serve.request import Sampling
from haori.serve.sampling.constraints import Constraints, Matcher, json_rule
from haori.serve.sampling.sampler import SamplerState, choose

pytest.importorskip("llguidance")


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str = Field(max_length=6)
    weight: int = Field(ge=-3, le=20)


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["buy", "sell"]
    lines: list[Line] = Field(max_length=2)
    urgent: bool
    note: Literal["naïve 日本"] | None


@pytest.fixture(scope="module")
def constraints(tiny_tokenizer) -> Constraints:
    return Constraints(tiny_tokenizer, len(tiny_tokenizer) + 5, [tiny_tokenizer.eos_token_id])


def follow(matcher: Matcher, tokenizer, text: str) -> None:
    for token in tokenizer.encode(text):
        assert matcher.allowed()[token], f"{tokenizer.decode([token])!r} of {text!r}"
        matcher.accept(token)


def answer(constraints: Constraints, tokenizer, schema: dict, logits, sampling: Sampling) -> str:
    """Sample an answer; `logits` maps the tokens so far to (1, V)."""
    stops = frozenset({tokenizer.eos_token_id})
    state = SamplerState(sampling, (), logits([]).shape[1], stops, constraints.compile(schema))
    tokens: list[int] = []
    while not state.ended:
        assert len(tokens) < 1500
        choice = choose(logits(tokens), [state])[0]
        assert choice.error is None
        tokens.append(choice.token)
    return tokenizer.decode(tokens, skip_special_tokens=True)


@example_settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 2.0, 20.0]), min_tokens=st.sampled_from([0, 60]))
def test_random_logits_give_json_that_fits(seed, spread, min_tokens, constraints, tiny_tokenizer):
    generator = torch.Generator().manual_seed(seed)
    width = len(tiny_tokenizer) + 5

    def logits(_: list[int]) -> torch.Tensor:
        return torch.randn(1, width, generator=generator) * spread

    sampling = Sampling(seed=seed, top_p=0.99, min_tokens=min_tokens)
    text = answer(constraints, tiny_tokenizer, Order.model_json_schema(), logits, sampling)
    Order.model_validate_json(text, strict=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_random_weights_gives_json_that_fits(temperature, tiny_base_folder: Path, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder).eval()
    constraints = Constraints(tiny_tokenizer)
    start = tiny_tokenizer.encode("answer the question")

    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([[*start, *tokens][-200:]])).logits[:, -1]

    text = answer(
        constraints, tiny_tokenizer, Line.model_json_schema(), logits, Sampling(temperature=temperature, seed=2)
    )
    Line.model_validate_json(text, strict=True)


@pytest.mark.parametrize("indent", [None, 2, 4])
def test_usual_layouts_are_allowed_and_the_end_only_at_the_end(indent, constraints, tiny_tokenizer):
    order = {"kind": "buy", "lines": [{"text": "é\n", "weight": 7}], "urgent": True, "note": "naïve 日本"}
    text = json.dumps(order, indent=indent, ensure_ascii=False)
    matcher = constraints.compile(Order.model_json_schema())
    follow(matcher, tiny_tokenizer, text[:-1])
    assert not matcher.allowed()[tiny_tokenizer.eos_token_id]
    assert not matcher.finished
    follow(matcher, tiny_tokenizer, text[-1])
    assert matcher.finished
    assert matcher.allowed().nonzero()[:, 0].tolist() == [tiny_tokenizer.eos_token_id]


def test_an_answer_that_may_go_on_ends_with_an_end_token(constraints, tiny_tokenizer):
    matcher = constraints.compile({"type": "integer"})
    follow(matcher, tiny_tokenizer, "12")
    assert not matcher.finished
    assert matcher.allowed()[tiny_tokenizer.eos_token_id]
    matcher.accept(tiny_tokenizer.eos_token_id)
    assert matcher.finished


def test_spaces_come_to_an_end(constraints, tiny_tokenizer):
    matcher = constraints.compile(Line.model_json_schema())
    space = tiny_tokenizer.convert_tokens_to_ids("Ġ")
    follow(matcher, tiny_tokenizer, "{")
    count = 0
    while matcher.allowed()[space]:
        matcher.accept(space)
        count += 1
    assert 8 <= count <= 64


def test_an_empty_schema_allows_any_object_and_nothing_else(constraints, tiny_tokenizer):
    matcher = constraints.compile({})
    assert not matcher.allowed()[tiny_tokenizer.encode("1")[0]]
    follow(matcher, tiny_tokenizer, '{"any": [1, {"thing": null}]}')
    assert matcher.finished


def test_tokens_beyond_the_tokenizer_are_never_allowed(constraints, tiny_tokenizer):
    allowed = constraints.compile({"type": "string"}).allowed()
    assert len(allowed) == len(tiny_tokenizer) + 5
    assert not allowed[len(tiny_tokenizer) :].any()


def test_answers_of_one_schema_do_not_disturb_one_another(constraints, tiny_tokenizer):
    schema = Line.model_json_schema()
    first, second = constraints.compile(schema), constraints.compile(schema)
    follow(first, tiny_tokenizer, '{"text"')
    follow(second, tiny_tokenizer, '{"text": "a", "weight": 1}')
    follow(first, tiny_tokenizer, ': "b", "weight": 2}')
    assert first.finished and second.finished


def test_the_order_of_properties_is_the_schemas_own(constraints, tiny_tokenizer):
    one, other = {"a": {"type": "null"}}, {"b": {"type": "null"}}
    for properties, text in (({**one, **other}, '{"a":null,"b"'), ({**other, **one}, '{"b":null,"a"')):
        follow(constraints.compile({"properties": properties, "required": ["a", "b"]}), tiny_tokenizer, text)


def test_only_so_many_schemas_are_kept(tiny_tokenizer):
    from haori.serve.sampling.constraints import _COMPILED_SCHEMAS

    constraints = Constraints(tiny_tokenizer)
    first = constraints.compile({"const": 0})
    for value in range(1, _COMPILED_SCHEMAS + 5):
        constraints.compile({"const": value})
    assert len(constraints._compiled) == _COMPILED_SCHEMAS
    follow(first, tiny_tokenizer, "0")
    follow(constraints.compile({"const": 0}), tiny_tokenizer, "0")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "banana"}, "Invalid type: banana"),
        ({"type": "object", "not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
        ({"type": "object", "not": {}, "x-guidance": {"lenient": True}}, "Unimplemented keys"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum \\(5\\) is greater"),
        ({"$ref": "https://example.com/schema"}, "is not present"),
        ({"$ref": "#"}, "cannot be used \\(.+\\)"),
        ({"const": float("nan")}, "cannot be written as JSON"),
        ({"const": object()}, "cannot be written as JSON"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(schema, message, constraints):
    with pytest.raises(InputError, match=message) as raised:
        constraints.compile(schema)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.alone
def test_a_schema_that_takes_too_long_is_refused_in_time_and_others_go_on(tiny_tokenizer):
    constraints = Constraints(tiny_tokenizer)
    slow = {"allOf": [{"type": "string", "pattern": f"[a-z]+{number}"} for number in range(40)]}
    began, gaps = time.monotonic(), []
    ended = threading.Event()

    def watch():
        last = time.monotonic()
        while not ended.wait(0.01):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    watching = threading.Thread(target=watch)
    watching.start()
    with pytest.raises(InputError, match="takes longer than 3 s"):
        constraints.compile(slow)
    first = time.monotonic() - began
    ended.set()
    watching.join()
    assert first < 30.0
    assert max(gaps) < 1.5  # other threads went on
    again = time.monotonic()
    with pytest.raises(InputError, match="takes longer than 3 s"):
        constraints.compile(slow)
    assert time.monotonic() - again < 1.0  # it is remembered
    follow(constraints.compile(Line.model_json_schema()), tiny_tokenizer, '{"text": "a", "weight": 1}')
    grammar = "start: /" + "&".join(f"(?P<x>[a-z]+{number})" for number in range(3)) + "/"
    with pytest.raises(InputError):
        constraints.compile_grammar(grammar)
    constraints.close()


@pytest.mark.parametrize("length", [10**6, 10**9])
def test_a_huge_limit_of_length_costs_no_more_than_a_small_one(length, constraints, tiny_tokenizer):
    began = time.monotonic()
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": length}}, "required": ["a"]}
    matcher = constraints.compile(schema)
    follow(matcher, tiny_tokenizer, '{"a": "' + "hello " * 200)
    assert time.monotonic() - began < 20.0


@pytest.mark.alone
def test_a_schema_that_is_too_large_is_refused_before_it_is_compiled(constraints):
    began = time.monotonic()
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(10_000)}}
    with pytest.raises(InputError, match=r"more than 131,072 bytes"):
        constraints.compile(schema)
    assert time.monotonic() - began < 5.0


def test_a_schema_nested_too_deeply_is_refused(constraints):
    schema: dict = {"type": "null"}
    for _ in range(3000):
        schema = {"items": schema, "type": "array"}
    with pytest.raises(InputError, match=r"cannot be (used|written)"):
        constraints.compile(schema)


def test_a_grammar_may_hold_json_that_fits_a_schema(constraints, tiny_tokenizer):
    schema = {"$ref": "#/$defs/line", "$defs": {"line": Line.model_json_schema()}}
    matcher = constraints.compile_grammar(f'start: "call " body ";"\nbody: {json_rule(schema)}')
    assert not matcher.allowed()[tiny_tokenizer.encode("{")[0]]
    follow(matcher, tiny_tokenizer, 'call {"text": "abcdef", "weight": 20}')
    assert not matcher.allowed()[tiny_tokenizer.eos_token_id]
    follow(matcher, tiny_tokenizer, ";")
    assert matcher.finished
    sampling = Sampling(grammar='start: "a" | "b"')
    assert constraints.of(sampling).allowed().nonzero()[:, 0].tolist() == sorted(tiny_tokenizer.encode("ab"))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("begin: /a/", "schema of a tool, cannot be used"),
        ("start: /(a/", "schema of a tool, cannot be used"),
        ("", "schema of a tool, cannot be used"),
        (f"start: {json_rule({'not': {}})}", "Unimplemented keys"),
        (f"start: {json_rule({'not': {}, 'x-guidance': {'lenient': True}})}", "Unimplemented keys"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(grammar, message, constraints):
    with pytest.raises(InputError, match=message) as raised:
        constraints.compile_grammar(grammar)
    assert "\n" not in str(raised.value)


def test_a_schema_and_a_grammar_at_once_are_refused():
    with pytest.raises(ValueError, match="not to both"):
        Sampling(grammar='start: "a"', json_schema={})


def test_a_token_that_does_not_fit_is_refused(constraints, tiny_tokenizer):
    matcher = constraints.compile({"type": "integer"})
    with pytest.raises(InputError, match="cannot be kept to its schema"):
        matcher.accept(tiny_tokenizer.encode("{")[0])
    assert not matcher.finished
    with pytest.raises(InputError, match="cannot be kept"):
        matcher.allowed()


def test_without_llguidance_the_install_line_is_named(tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'haori\[structured\]'"):
        Constraints(tiny_tokenizer).compile({})


def test_a_tokenizer_of_another_kind_is_refused():
    class Letters:
        eos_token_id = 0

        def __len__(self) -> int:
            return 26

    with pytest.raises(InputError, match="tokenizer is of another kind"):
        Constraints(Letters()).compile({})
