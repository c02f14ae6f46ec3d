"""`structured_outputs` and `guided_*`: answers of a real model fit, whatever it likes; contradictions are refused."""

import json
import re

import httpx
import pytest

from haori.bases import find_base
from tests.integration.test_serve_openai import HELLO, client_of
from tests.server_samples import SmallDirectory, served

pytest.importorskip("llguidance")

CHOICES = ["yes", 'no "way"\n', "peut-être / 京都", "a\\b"]
SCHEMA = {
    "type": "object", "properties": {"n": {"type": "integer", "minimum": 10, "maximum": 12}}, "required": ["n"],
    "additionalProperties": False,
}  # fmt: skip
GBNF = 'root ::= greeting " " name\ngreeting ::= "hi" | "hello"\nname ::= [a-c]'
LARK = 'start: greeting " " NAME\ngreeting: "hi" | "hello"\nNAME: /[a-c]/'


def is_json(text, check):
    return check(json.loads(text))


FITS = {
    "choice": [(CHOICES, lambda text: text in CHOICES)],
    "regex": [
        (r"\d{3}-[\d]\D", lambda text: re.fullmatch(r"[0-9]{3}-[0-9][^0-9]", text)),
        (r"\\d", lambda text: text == "\\d"),
        (r"^(yes|no)$", lambda text: text in ("yes", "no")),
        (r"[x/]{2}/\/\\", lambda text: re.fullmatch(r"[x/]{2}//\\", text)),
        ("a\nb", lambda text: text == "a\nb"),
        (r"(?i)ab", lambda text: text.lower() == "ab"),
    ],
    "grammar": [
        (given, lambda text: re.fullmatch(r"(hi|hello) [a-c]", text)) for given in (GBNF, LARK)
    ],
    "json": [
        (given, lambda text: is_json(text, lambda found: found["n"] in (10, 11, 12)))
        for given in (SCHEMA, json.dumps(SCHEMA))
    ],
}  # fmt: skip
CASES = [(kind, given, fits) for kind, cases in FITS.items() for given, fits in cases]


@pytest.fixture(scope="module")
def server(tiny_base_folder, tmp_path_factory):
    from haori.serve import EngineLimits, open_engine

    engine = open_engine(
        find_base(str(tiny_base_folder)), lambda adapter: None, EngineLimits(context_length=256),
        weights="fp32", cache_bytes=16 << 20,
    )  # fmt: skip
    with served(engine, SmallDirectory(), home=tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.mark.parametrize(("kind", "given", "fits"), CASES)
def test_answers_fit(server, kind, given, fits):
    asked = {"model": "tiny", "temperature": 3.0, "max_tokens": 100}
    with client_of(server) as client:
        for extra in ({"structured_outputs": {kind: given}}, {f"guided_{kind}": given}):
            for seed in range(3):
                reply = client.chat.completions.create(**asked, messages=HELLO, seed=seed, extra_body=extra)
                assert reply.choices[0].finish_reason == "stop"
                assert fits(reply.choices[0].message.content), reply.choices[0].message.content
            reply = client.completions.create(**asked, prompt="hello", n=2, extra_body=extra)
            assert all(fits(choice.text) for choice in reply.choices)


def test_every_choice_can_come(server):
    with client_of(server) as client:
        reply = client.completions.create(
            model="tiny", prompt="hello", temperature=100, n=16, seed=1, max_tokens=50,
            extra_body={"guided_choice": CHOICES},
        )  # fmt: skip
    assert {choice.text for choice in reply.choices} == set(CHOICES)


def test_any_object_and_any_json(server):
    for extra in ({"structured_outputs": {"json_object": True}}, {"guided_json": {}}):
        error = ask(server, **extra, max_tokens=1)
        assert error["choices"][0]["finish_reason"] == "length"
    kept = ask(server, structured_outputs={"json_object": True}, logprobs=True, top_logprobs=20, max_tokens=1)
    tops = [one["token"] for one in kept["choices"][0]["logprobs"]["content"]]
    assert tops[0].startswith("{")


def ask(server, path="chat/completions", **fields):
    body = {"model": "tiny", "max_tokens": 30, **({"messages": HELLO} if "chat" in path else {"prompt": "a"}), **fields}
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60).json()


TOOLS = [{"type": "function", "function": {"name": "f"}}]
OBJECT = {"type": "json_object"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", "'guided_choice' and 'guided_regex' both say"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "'structured_outputs.json' b"),
        ({"structured_outputs": {"json": {}}, "guided_json": {}}, "structured_outputs.json", "'guided_json' both say"),
        ({"guided_json": {}, "response_format": OBJECT}, "guided_json", "and 'response_format' both say"),
        ({"guided_grammar": LARK, "tools": TOOLS}, "guided_grammar", "and 'tools' both say"),
        ({"structured_outputs": {}}, "structured_outputs", "says nothing; give 'choice'"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "says nothing"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "is not supported"),
        ({"structured_outputs": {"chioce": ["a"]}}, "structured_outputs.chioce", "'choice'"),
        ({"guided_choice": []}, "guided_choice", "at least 1 item"),
        ({"guided_json": "{"}, "guided_json", "a JSON schema, as an object or the JSON of one"),
        ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "is not supported"),
        ({"guided_regex": "(?=a)b"}, None, "look-ahead and look-behind, is not supported"),
        ({"guided_regex": "(a"}, None, "unclosed group"),
        ({"guided_grammar": "start: nothing"}, None, "cannot be used ("),
        ({"guided_grammar": "root ::= x"}, None, "Rule 'x' not found"),
        ({"guided_grammar": "root ::= " + "(" * 5000}, None, "cannot be used (as GBNF: "),
        ({"guided_grammar": "root ::= " + '"a" ' * 5000}, None, "GBNF of more than 16,384 characters"),
        ({"guided_choice": ["a" * 150_000]}, None, "more than 131,072 bytes"),
    ],
)
def test_what_contradicts_or_cannot_be_kept_to_is_a_sentence(server, fields, param, words):
    error = ask(server, **fields)["error"]
    assert words in error["message"]
    assert error["param"] == param
    if not {"tools", "response_format"} & fields.keys():
        assert words in ask(server, "completions", **fields)["error"]["message"]


def test_tools_that_may_not_be_called_contradict_nothing(server):
    reply = ask(server, guided_choice=["yes"], tools=TOOLS, tool_choice="none", response_format={"type": "text"})
    assert reply["choices"][0]["message"]["content"] == "yes"
