"""`/v1/responses` with the official client in strict mode: whole, streamed and parsed; what it says and refuses."""

import json

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from haori.bases import find_base
from tests.integration.test_serve_openai import client_of
from tests.integration.test_serve_tools import CALLS, Scripted, family_of
from tests.server_samples import RepeatingEngine, served, until
from tests.tool_bases import build_tool_base

HELLO = "How is the weather in Kyoto?"
PATH = "/v1/responses"


class GetWeather(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=8)
    days: int = Field(ge=0, le=20)


TOOL = {"type": "function", "name": "get_weather", "description": "The weather.", "strict": True,
        "parameters": GetWeather.model_json_schema()}  # fmt: skip
ADD = {"type": "function", "name": "add", "description": None, "strict": None, "parameters": None}


@pytest.fixture
def server(tiny_tokenizer, tmp_path):
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path) as running:
        yield running


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A client of a server over a real tiny model that writes calls as Hermes does."""
    pytest.importorskip("llguidance")
    from haori.serve import EngineLimits, open_engine

    folder = build_tool_base(tmp_path_factory.mktemp("base"), "hermes")
    limits = EngineLimits(context_length=2048)
    engine = open_engine(find_base(str(folder)), lambda _: None, limits, weights="fp32", cache_bytes=16 << 20)
    with served(engine, home=tmp_path_factory.mktemp("home")) as server, client_of(server) as client:
        yield client


def test_text_in_and_out(client, server, tiny_tokenizer):
    reply = client.responses.create(
        model="support@2", input="hello", instructions="be brief", max_output_tokens=5, temperature=0.5,
        metadata={"a": "b"}, extra_body={"seed": 1, "top_k": 3},
    )  # fmt: skip
    [request] = server.engine.seen
    prompt = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(request.prompt) == prompt
    assert (request.sampling.seed, request.sampling.top_k, request.sampling.temperature) == (1, 3, 0.5)
    assert reply.output_text == tiny_tokenizer.decode(request.prompt[1:6], skip_special_tokens=True)
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.output[0].status == "incomplete"
    assert (reply.model, reply.object, reply.instructions, reply.metadata) == (
        "support@2",
        "response",
        "be brief",
        {"a": "b"},
    )
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (len(request.prompt), 5)
    assert reply.usage.total_tokens == len(request.prompt) + 5
    assert reply.usage.input_tokens_details.cached_tokens == 2
    assert reply.tools == [] and reply.tool_choice == "auto" and reply.store is False


def test_a_conversation_of_items(client, server, tiny_tokenizer):
    first = client.responses.create(model="tiny", input="one", max_output_tokens=3)
    items = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        *[item.model_dump() for item in first.output], {"type": "message", "role": "user", "content": "two"},
    ]  # fmt: skip
    client.responses.create(model="tiny", input=items, instructions="be brief")
    rendered = tiny_tokenizer.decode(server.engine.seen[1].prompt)
    assert "system\nbe brief\n\nbe kind<|im_end|>\n<|im_start|>user\none<|im_end|>" in rendered
    assert f"assistant\n{first.output_text}<|im_end|>\n<|im_start|>user\ntwo<|im_end|>" in rendered


def test_a_stream_has_the_clients_events_in_order_and_says_the_same(client):
    asked = {"model": "tiny", "input": HELLO, "max_output_tokens": 6, "include": ["message.output_text.logprobs"],
             "top_logprobs": 2}  # fmt: skip
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1].response
    assert last.output_text == events[-4].text == whole.output_text
    assert last.usage == whole.usage
    assert len({event.item_id for event in events[3:-2]} | {last.output[0].id}) == 1
    assert len(whole.output[0].content[0].logprobs) == 6
    assert last.output[0].content[0].logprobs == whole.output[0].content[0].logprobs


def test_events_bear_their_names(server):
    body = {"model": "tiny", "input": "x", "stream": True, "max_output_tokens": 2}
    lines = [line for line in httpx.post(server.url + PATH, json=body).text.splitlines() if line]
    names, data = lines[::2], lines[1::2]
    assert names[0] == "event: response.created"
    for name, one in zip(names, data, strict=True):
        assert name.removeprefix("event: ") == json.loads(one.removeprefix("data: "))["type"]


def test_the_helpers_of_the_client(real):
    parsed = real.responses.parse(model="tiny", input=HELLO, text_format=GetWeather)
    assert isinstance(parsed.output_parsed, GetWeather)
    with real.responses.stream(model="tiny", input=HELLO, text_format=GetWeather) as stream:
        assert "response.output_text.delta" in {event.type for event in stream}
        assert isinstance(stream.get_final_response().output_parsed, GetWeather)
    tool = openai.pydantic_function_tool(GetWeather)
    asked = {"model": "tiny", "input": HELLO, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    [call] = real.responses.parse(**asked).output
    assert isinstance(call.parsed_arguments, GetWeather)
    with real.responses.stream(**asked) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        [call] = stream.get_final_response().output
    assert len(snapshots) > 3
    assert snapshots[-1] == call.arguments
    assert isinstance(call.parsed_arguments, GetWeather)
    some = real.responses.create(
        model="tiny", input="x", text={"format": {"type": "json_object"}}, max_output_tokens=400
    )
    assert some.status == "incomplete" or isinstance(json.loads(some.output_text), dict)


def test_a_call_and_its_result(real):
    items = [{"role": "user", "content": HELLO}]
    first = real.responses.create(
        model="tiny", input=items, tools=[TOOL, ADD], tool_choice={"type": "function", "name": "get_weather"}
    )
    [call] = first.output
    assert (first.status, call.type, call.name, call.status) == (
        "completed",
        "function_call",
        "get_weather",
        "completed",
    )
    GetWeather.model_validate_json(call.arguments, strict=True)
    items += [call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}]
    asked = {"model": "tiny", "input": items, "tools": [TOOL], "max_output_tokens": 10, "temperature": 0}
    second = real.responses.create(**asked)
    assert second.output[0].type == "message"
    events = list(real.responses.create(**asked, stream=True))
    assert events[-1].response.output_text == second.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_text_and_calls_are_items_of_their_own(tmp_path):
    from transformers import AutoTokenizer

    engine = Scripted(AutoTokenizer.from_pretrained(build_tool_base(tmp_path / "base", "hermes")))
    call = CALLS[family_of(engine)]
    engine.text = f"I count.\n{call}\n{call}"
    with served(engine, home=tmp_path) as server, client_of(server) as client:
        asked = {"model": "tiny", "input": HELLO, "tools": [ADD]}
        whole = client.responses.create(**asked)
        events = list(client.responses.create(**asked, stream=True))
        single = client.responses.create(**asked, parallel_tool_calls=False)
        engine.text = ""
        engine.asked.clear()
    for response in (whole, events[-1].response):
        assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
        assert response.output_text == "I count."
        assert [item.arguments for item in response.output[1:]] == ['{"numbers": [1, 2]}'] * 2
        assert len({item.call_id for item in response.output[1:]}) == 2
        assert response.status == "completed"
    assert [item.type for item in single.output] == ["message", "function_call"]
    done = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert done == [item.id for item in events[-1].response.output]


def test_an_answer_that_fails_in_the_middle(client, server):
    server.engine.fail_with = "The adapter 'support' is damaged."
    with pytest.raises(openai.InternalServerError, match="damaged"):
        client.responses.create(model="support", input=HELLO)
    *_, last = client.responses.create(model="support", input=HELLO, stream=True)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert (last.response.error.code, "damaged" in last.response.error.message) == ("server_error", True)
    until(lambda: server.engine.status().running == 0)


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"store": True}, "store", "stores no responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "not supported"),
        ({"max_tokens": 3}, "max_tokens", "not supported"),
        ({"max_output_token": 3}, "max_output_token", "did you mean 'max_output_tokens'"),
        ({"instruction": "x"}, "instruction", "did you mean 'instructions'"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "reasoning.encrypted_content"),
        ({"tools": [{"type": "web_search", "filters": {}}]}, "tools[0].type", "'web_search'"),
        ({"tools": [{"type": "mcp", "server_url": "x"}]}, "tools[0].type", "'mcp'"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
        ({"tools": [ADD], "include": ["message.output_text.logprobs"]}, "include", "without one"),
        ({"tool_choice": {"type": "function", "name": "b"}, "tools": [ADD]}, "tool_choice", "among the tools: add"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "xml"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
        ({"input": []}, "input", "[]"),
        ({"input": None}, "input", "None"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "function_call_output"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0].image_url", "not supported"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id",
         "no call before it"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "x"}]}, "input[0].arguments",
         "JSON of an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(server, asked, param, words):
    reply = httpx.post(server.url + PATH, json={"model": "tiny", "input": "x", **asked})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert words in error["message"]
    assert error["message"].endswith((".", "?"))


@pytest.mark.parametrize(
    "asked",
    [{"store": False}, {"store": None, "previous_response_id": None, "background": False, "truncation": "disabled"},
     {"include": [], "tools": [], "tool_choice": "auto", "reasoning": None, "text": {"format": {"type": "text"}}},
     {"text": {"verbosity": "medium"}, "stream_options": {"include_obfuscation": False}, "user": "u"}],
)  # fmt: skip
def test_fields_that_change_no_answer_are_taken(server, asked):
    assert httpx.post(server.url + PATH, json={"model": "tiny", "input": "x", **asked}).status_code == 200
