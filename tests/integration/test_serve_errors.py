"""Whatever is wrong with a request, the reply has the one shape, a request id, and a sentence that names the field."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server_samples import RepeatingEngine, SmallDirectory, served

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def http(tiny_tokenizer, tmp_path_factory):
    with (
        served(RepeatingEngine(tiny_tokenizer), home=tmp_path_factory.mktemp("home")) as server,
        httpx.Client(base_url=server.url, timeout=20) as client,
    ):
        yield client


def tool(name, **more):
    return {"type": "function", "function": {"name": name, **more}}


def call(arguments):
    return {"id": "c", "type": "function", "function": {"name": "a", "arguments": arguments}}


def error_of(reply, status):
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "?"))
    return error


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"zzz": None}, "zzz", "no field"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "a b"),
        ({"tools": [{"type": "function", "function": {"name": "a", "params": {}}}]}, "tools[0].function.params",
         "did you mean 'parameters'"),
        ({"tools": [tool("a", parameters={"type": "array"})]}, "tools", "'object'"),
        ({"tools": [tool("a"), tool("a")]}, "tools", "twice"),
        ({"tool_choice": "required"}, "tool_choice", "no 'tools'"),
        ({"tool_choice": "always", "tools": [tool("a")]}, "tool_choice", "'always'"),
        ({"tool_choice": {"type": "function", "function": {"name": "b"}}, "tools": [tool("a")]}, "tool_choice",
         "among the tools: a"),
        ({"tool_choice": {"type": "function"}, "tools": [tool("a")]}, "tool_choice.function", "missing"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"temperature": True}, "temperature", "True"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "-2"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"max_tokens": 2.5}, "max_tokens", "2.5"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"n": 0}, "n", "0"),
        ({"n": 17}, "n", "at most 16"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": [""]}, None, "empty"),
        ({"stop": 3}, "stop", "3"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"1": "x"}}, "logit_bias", "'x'"),
        ({"logit_bias": {"2": 1}}, None, "cannot be biased"),
        ({"logprobs": 3}, "logprobs", "3"),
        ({"top_logprobs": 2}, "top_logprobs", "only for"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only for"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "include_usage"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "hello"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", "'critic'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id",
         "no call before it"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id",
         "not supported"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [call("{}")]}]}, "messages[0].tool_calls",
         "assistant's"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [call("[1]")]}]},
         "messages[1].tool_calls[0].function.arguments", "JSON of an object"),
        ({"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": []}]}, "messages[1].content",
         "None"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "None"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name", "not supported"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
         "messages[1].tool_calls[0].id", "missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].image_url", "not supported"),
        ({"model": ""}, "model", "at least 1"),
        ({"model": None}, "model", "None"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_used_is_named(http, asked, param, words):
    error = error_of(http.post(CHAT, json={"model": "tiny", "messages": HELLO, **asked}), 400)
    assert error["param"] == param, error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [tool("a")], "tool_choice": "none"},
        {"tools": [tool("a", parameters=None, strict=None)], "tool_choice": "auto"},
        {"tools": None, "tool_choice": "none", "functions": [], "audio": None, "modalities": ["text"]},
        {"temperature": None, "stop": None, "n": None, "stream": None, "logit_bias": None, "response_format": None},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k",
         "safety_identifier": "s", "parallel_tool_calls": True, "response_format": {"type": "text"}},
    ],
)  # fmt: skip
def test_fields_that_change_no_answer_are_taken(http, asked):
    assert http.post(CHAT, json={"model": "tiny", "messages": HELLO, **asked}).status_code == 200


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        (b"{", JSON, "not JSON"),
        (b"", JSON, "JSON object"),
        (b"[]", JSON, "JSON object"),
        (b"3", JSON, "JSON object"),
        (b"{}", JSON, "missing"),
        (b"\xff\xfe", JSON, "body"),
        (b"[" * 100_000, JSON, "body"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}]}', {"content-type": "text/plain"}, "JSON"),
    ],
)
def test_a_body_that_is_no_request(http, body, headers, words):
    error = error_of(http.post(CHAT, content=body, headers=headers), 400)
    assert words in error["message"]


@pytest.mark.parametrize("name", ["model", "strange\ud800", "user"])
def test_halves_of_characters_do_not_break_the_reply(http, name):
    body = json.dumps({"model": "tiny", "messages": HELLO, name: "\ud800"})
    assert error_of(http.post(CHAT, content=body, headers=JSON), 400)
    broken = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "\udfff"}]})
    assert error_of(http.post(CHAT, content=broken, headers=JSON), 400)


@pytest.mark.parametrize("depth", [100, 400, 800, 2000, 100_000])
@pytest.mark.parametrize("field", ["metadata", "model", "zzz", "messages"])
def test_deeply_nested_values_do_not_break_the_reply(http, field, depth):
    body = json.dumps({"model": "tiny", "messages": HELLO})[:-1] + f', "{field}": ' + "[" * depth + "]" * depth + "}"
    reply = http.post(CHAT, content=body, headers=JSON)
    assert reply.status_code == 200 if field == "metadata" and depth < 800 else reply.status_code in {200, 400}


def test_numbers_that_are_none(http):
    body = '{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}'
    assert error_of(http.post(CHAT, content=body, headers=JSON), 400)["param"] == "temperature"


def test_unknown_addresses_methods_and_models(http):
    assert error_of(http.get("/v1/nothing"), 404)["type"] == "not_found_error"
    error_of(http.get(CHAT), 405)
    error_of(http.delete("/health"), 405)
    error = error_of(http.post(CHAT, json={"model": "missing", "messages": HELLO}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error_of(http.get("/v1/models/missing/one"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], [[1, 2], []], [-1], [10**6], [1, "a"]])
def test_prompts_that_cannot_be_completed(http, prompt):
    error = error_of(http.post("/v1/completions", json={"model": "tiny", "prompt": prompt}), 400)
    assert error["param"] == "prompt" or error["param"].startswith("prompt[")


def test_a_body_that_is_too_large_is_not_read(http):
    error_of(http.post(CHAT, content=b"x" * 1_100_000, headers=JSON), 413)

    def pieces():
        for _ in range(30):
            yield b" " * 50_000

    error_of(http.post(CHAT, content=pieces(), headers=JSON), 413)


def test_request_ids(http):
    assert http.get("/health", headers={"x-request-id": "trace-1:a"}).headers["x-request-id"] == "trace-1:a"
    for strange in ("a b", "x" * 129, "<script>"):
        assert http.get("/health", headers={"x-request-id": strange}).headers["x-request-id"].startswith("req_")
    assert http.get("/health").headers["x-request-id"] != http.get("/health").headers["x-request-id"]


def test_an_error_nobody_foresaw_is_500_and_only_the_log_says_why(tiny_tokenizer, tmp_path):
    class Broken(SmallDirectory):
        def resolve(self, model):
            raise ZeroDivisionError("a secret detail")

    with served(RepeatingEngine(tiny_tokenizer), Broken(), home=tmp_path) as server:
        reply = httpx.post(server.url + CHAT, json={"model": "tiny", "messages": HELLO})
        error = error_of(reply, 500)
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"] in error["message"]
        assert "a secret detail" in server.log.getvalue()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "stop",
        "n",
        "stream",
        "logit_bias",
        "response_format",
        "tools",
        "tool_choice",
        "seed",
        "stream_options",
        "x",
    ]
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3))
def test_no_request_makes_the_server_fail(http, changes):
    body = json.dumps({"model": "tiny", "messages": HELLO, **changes})
    reply = http.post(CHAT, content=body, headers=JSON)
    assert reply.status_code in {200, 400, 404}, reply.text
    if reply.status_code != 200:
        error_of(reply, reply.status_code)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
         "response_format.json_schema.schema"),
        ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 1}}},
         "response_format.json_schema.schema"),
        ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "shema": {}}}},
         "response_format.json_schema.shema"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": 5}},
         "response_format.json_schema"),
        ("chat/completions", {"response_format": {"type": "text", "json_schema": 5}}, "response_format.json_schema"),
        ("chat/completions", {"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
         "messages[0].content[0].text"),
        ("chat/completions", {"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ("responses", {"input": "a", "text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ("responses", {"input": "a", "text": {"format": {"type": "json_schema", "name": "a", "schema": 5}}},
         "text.format.schema"),
        ("responses", {"input": [{"type": "message", "role": "user", "content": 5}]}, "input[0].content"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ("completions", {"prompt": [[1, "a"]]}, "prompt[0][1]"),
    ],
)  # fmt: skip
def test_fields_are_named_as_the_client_wrote_them(http, path, fields, param):
    messages = {"messages": [{"role": "user", "content": "a"}]} if path.startswith("chat") else {}
    reply = http.post(f"/v1/{path}", json={"model": "tiny", **messages, **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert repr(param) in error["message"]
