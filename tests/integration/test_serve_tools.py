"""Tools over HTTP with the official client: certain calls by real tiny models, and calls that are read in text."""

import json
from dataclasses import replace

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from haori.bases import find_base
from haori.serve.request import StreamChunk
from tests.integration.test_serve_openai import client_of
from tests.server_samples import RepeatingEngine, served
from tests.tool_bases import TEMPLATES, build_tool_base

HELLO = [{"role": "user", "content": "How is the weather in Kyoto?"}]


class GetWeather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=8)
    days: int = Field(ge=0, le=20)


class Add(BaseModel):
    model_config = ConfigDict(extra="forbid")
    numbers: list[int] = Field(max_length=2)


KINDS = {"get_weather": GetWeather, "add": Add}


def function(name, kind, **more):
    schema = kind.model_json_schema()
    return {
        "type": "function",
        "function": {"name": name, "description": "What it does.", "parameters": schema, **more},
    }


TOOLS = [function(name, kind) for name, kind in KINDS.items()]


@pytest.fixture(scope="module", params=list(TEMPLATES))
def base_folder(request, tmp_path_factory):
    return build_tool_base(tmp_path_factory.mktemp(f"base-{request.param}"), request.param)


@pytest.fixture(scope="module")
def real(base_folder, tmp_path_factory):
    """A client of a server over a real tiny model."""
    pytest.importorskip("llguidance")
    from haori.serve import EngineLimits, open_engine

    engine = open_engine(
        find_base(str(base_folder)), lambda adapter: None, EngineLimits(context_length=2048),
        weights="fp32", cache_bytes=16 << 20,
    )  # fmt: skip
    with served(engine, home=tmp_path_factory.mktemp("home")) as server, client_of(server) as client:
        yield client


def check(calls):
    for call in calls:
        assert call.type == "function"
        KINDS[call.function.name].model_validate_json(call.function.arguments, strict=True)
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize("choice", ["required", "add"])
def test_a_certain_call_fits_its_function(real, choice):
    tool_choice = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    reply = real.chat.completions.create(
        model="tiny", messages=HELLO, tools=TOOLS, tool_choice=tool_choice, parallel_tool_calls=False, n=2, seed=3,
    )  # fmt: skip
    for one in reply.choices:
        assert one.finish_reason == "tool_calls"
        assert one.message.content is None
        assert len(one.message.tool_calls) == 1
        check(one.message.tool_calls)
        assert choice in {"required", one.message.tool_calls[0].function.name}


def streamed(chunks):
    """Put the deltas of one answer together as the clients do, and look at their order."""
    text, calls, finish, pieces = "", {}, None, 0
    for chunk in chunks:
        [choice] = chunk.choices
        text += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            if part.index not in calls:
                assert part.index == len(calls)
                assert part.id and part.type == "function" and part.function.name and part.function.arguments == ""
                calls[part.index] = [part.id, part.function.name, ""]
            else:
                assert part.id is None and part.function.name is None and part.function.arguments
                calls[part.index][2] += part.function.arguments
                pieces += 1
        finish = choice.finish_reason or finish
    return text, [call[1:] for call in calls.values()], finish, pieces


def test_a_certain_call_is_streamed_as_it_is_written(real):
    asked = {"model": "tiny", "messages": HELLO, "tools": TOOLS[:1], "tool_choice": "required", "temperature": 0,
             "parallel_tool_calls": False}  # fmt: skip
    text, calls, finish, pieces = streamed(real.chat.completions.create(**asked, stream=True))
    assert (text, finish) == ("", "tool_calls")
    assert pieces > 3  # not at once
    whole = real.chat.completions.create(**asked).choices[0].message.tool_calls
    assert calls == [[call.function.name, call.function.arguments] for call in whole]
    GetWeather.model_validate_json(calls[0][1], strict=True)


def test_a_call_that_is_cut_off_did_not_end_for_its_calls(real):
    asked = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": "required", "max_tokens": 40}
    reply = real.chat.completions.create(**asked).choices[0]
    assert reply.finish_reason == "length"


def test_the_second_turn_has_the_result(real):
    first = real.chat.completions.create(
        model="tiny", messages=HELLO, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    message = first.choices[0].message
    messages = [*HELLO, message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It rains."}]  # fmt: skip
    asked = {"model": "tiny", "messages": messages, "tools": TOOLS, "max_tokens": 12, "temperature": 0}
    second = real.chat.completions.create(**asked).choices[0]
    assert second.message.tool_calls is None
    text, calls, _, _ = streamed(real.chat.completions.create(**asked, stream=True))
    assert (text, calls) == (second.message.content, [])
    more = {"max_tokens": None, "parallel_tool_calls": False, "tool_choice": "required"}
    again = real.chat.completions.create(**{**asked, **more})
    check(again.choices[0].message.tool_calls)


def test_a_schema_that_cannot_be_kept_to_is_refused_where_it_would_have_to_be(real):
    tool = {
        "type": "function",
        "function": {"name": "odd", "parameters": {"type": "object", "not": {"required": ["x"]}}},
    }
    asked = {"model": "tiny", "messages": HELLO, "tools": [tool], "max_tokens": 2}
    assert real.chat.completions.create(**asked).choices[0].message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="schema of a tool"):
        real.chat.completions.create(**asked, tool_choice="required")
    tool["function"]["strict"] = True
    with pytest.raises(openai.BadRequestError, match='"not"'):
        real.chat.completions.create(**asked)


def test_the_clients_own_helpers_read_calls(real):
    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    asked = {
        "model": "tiny",
        "messages": HELLO,
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    parsed = real.chat.completions.parse(**asked).choices[0].message.tool_calls
    assert isinstance(parsed[0].function.parsed_arguments, GetWeather)
    with real.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert isinstance(final.message.tool_calls[0].function.parsed_arguments, GetWeather)


def test_an_answer_is_a_call_or_fits_the_schema_of_answers(real):
    schema = {"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"],
              "additionalProperties": False}  # fmt: skip
    reply = real.chat.completions.create(
        model="tiny", messages=HELLO, tools=[function("add", Add, strict=True)], parallel_tool_calls=False, n=8, seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )  # fmt: skip
    for choice in reply.choices:
        if choice.message.tool_calls:
            assert choice.finish_reason == "tool_calls"
            check(choice.message.tool_calls)
        else:
            assert set(json.loads(choice.message.content)) == {"sunny"}


class Scripted(RepeatingEngine):
    """Says one text, whatever it is asked."""

    def __init__(self, tokenizer, text=""):
        super().__init__(tokenizer)
        self.context_length = 4096
        self.text = text
        self.asked = []

    def submit(self, request, deliver):
        self.asked.append(request)
        tokens = tuple(t for letter in self.text for t in self.tokenizer.encode(letter, add_special_tokens=False))
        sampling = request.sampling.model_copy(update={"max_tokens": len(tokens), "seed": None})
        super().submit(replace(request, prompt=tokens, sampling=sampling), deliver)

    def _finish(self, job, delta: StreamChunk):
        super()._finish(job, replace(delta, finish="stop") if delta.finish == "length" else delta)


@pytest.fixture
def scripted(request, base_folder, tmp_path):
    """A client of a server that says what `engine.text` says; calls are in letters."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    engine = Scripted(tokenizer)
    with served(engine, home=tmp_path) as server, client_of(server) as client:
        yield client, engine


CALL = '{"name": "add", "arguments": {"numbers": [1, 2]}}'
CALLS = {
    "hermes": f"<tool_call>\n{CALL}\n</tool_call>", "mistral": f"[TOOL_CALLS] [{CALL}]", "json": CALL,
    "llama": CALL.replace("arguments", "parameters"),
}  # fmt: skip


def family_of(engine):
    return next(name for name, template in TEMPLATES.items() if engine.tokenizer.chat_template == template)


def test_calls_are_read_out_of_free_text(scripted):
    client, engine = scripted
    family = family_of(engine)
    before = "" if family in {"llama", "json"} else "Let me count.\n"
    engine.text = before + CALLS[family]
    asked = {"model": "tiny", "messages": HELLO, "tools": TOOLS}
    wanted = [["add", '{"numbers": [1, 2]}']]
    whole = client.chat.completions.create(**asked).choices[0]
    assert [[call.function.name, call.function.arguments] for call in whole.message.tool_calls] == wanted
    assert (whole.message.content, whole.finish_reason) == (before.strip() or None, "tool_calls")
    text, calls, finish, _ = streamed(client.chat.completions.create(**asked, stream=True))
    assert (text, calls, finish) == (before.strip(), wanted, "tool_calls")
    for other in ({"tool_choice": "none"}, {"tools": [function("weather", GetWeather)]}):
        untouched = client.chat.completions.create(**{**asked, **other}).choices[0]
        assert (untouched.message.content, untouched.message.tool_calls) == (engine.text, None)
        assert untouched.finish_reason == "stop"
        assert streamed(client.chat.completions.create(**{**asked, **other}, stream=True))[:2] == (engine.text, [])


def test_tools_calls_and_results_are_in_the_prompt(scripted):
    client, engine = scripted
    engine.text = "ok"
    calls = [{"id": "call_from_elsewhere", "type": "function",
              "function": {"name": "get_weather", "arguments": '{"city": "Nara", "days": 2}'}}]  # fmt: skip
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": "call_from_elsewhere",
                 "content": [{"type": "text", "text": "It rains."}]},
                {"role": "user", "content": "And tomorrow?"}]  # fmt: skip
    client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS)
    client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, tool_choice="none")
    prompt, without = (engine.tokenizer.decode(request.prompt) for request in engine.asked)
    for text in ('"get_weather"', '"add"', "What it does.", '"numbers"', "Nara", "It rains.", "And tomorrow?"):
        assert text in prompt, text
    assert "What it does." not in without and "It rains." in without
    if family_of(engine) == "json":
        assert "user\nget_weather returned: It rains.\n\nAnd tomorrow?<|im_end|>" in prompt
        assert 'assistant\n{"name": "get_weather", "arguments": {"city": "Nara", "days": 2}}<|im_end|>' in prompt
        assert prompt.startswith("<|im_start|>system\nYou can call these functions:")


def test_a_template_that_would_leave_a_result_out_is_refused(tiny_base_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)
    tokenizer.chat_template = TEMPLATES["hermes"].replace("+ m.content + '</tool_response>", "+ '</tool_response>")
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ]
    with served(Scripted(tokenizer, "x"), home=tmp_path) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="leaves the results of tools out"):
            client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS)
        server.engine.tokenizer.chat_template += "<function="
        with pytest.raises(openai.BadRequestError, match="does not read"):
            client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS)
