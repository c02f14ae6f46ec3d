"""Prompts with tools: what templates show, what is put into words, and that nothing is left out."""

import pytest

from haori.core.errors import DataError
from haori.data import render_tool_prompt
from tests.tool_bases import TEMPLATES

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
HELLO = {"role": "user", "content": "How much is it?"}


def call(identity, number):
    return {"id": identity, "type": "function", "function": {"name": "add", "arguments": {"n": number}}}


def result(identity, text):
    return {"role": "tool", "content": text, "tool_call_id": identity, "name": "add"}


SEVERAL = [HELLO, {"role": "assistant", "content": "I count.", "tool_calls": [call("one", 1), call("two", 2)]},
           result("two", "second"), result("one", "first"), {"role": "user", "content": "And?"}]  # fmt: skip


@pytest.fixture
def tokenizer(tiny_base_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base_folder)


def prompt(tokenizer, template, turns, tools=(TOOL,)):
    tokenizer.chat_template = template
    return tokenizer.decode(render_tool_prompt(tokenizer, turns, tools))


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("tools", [(TOOL,), ()])
def test_every_part_is_in_the_prompt(family, tools, tokenizer):
    text = prompt(tokenizer, TEMPLATES[family], SEVERAL, tools)
    for part in ("How much", "I count.", '{"n": 1}', '{"n": 2}', "first", "second", "And?", "add"):
        assert text.count(part) == 1 or part == "add", part
    assert ("Adds." in text) == bool(tools)


def test_a_template_of_single_calls_gets_them_one_by_one_each_before_its_result(tokenizer):
    text = prompt(tokenizer, TEMPLATES["llama"], SEVERAL)
    parts = ["I count.", '{"n": 1}', "first", '{"n": 2}', "second", "And?"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_foreign_ids_become_as_short_as_mistral_demands_and_stay_in_pairs(tokenizer):
    text = prompt(tokenizer, TEMPLATES["mistral"], SEVERAL)
    known = prompt(tokenizer, TEMPLATES["mistral"], [HELLO, {"role": "assistant", "content": "",
                   "tool_calls": [call("abcDEF123", 1)]}, result("abcDEF123", "first")])  # fmt: skip
    assert known.count("abcDEF123") == 2
    [first] = [line for line in text.split("[TOOL_RESULTS]") if line.startswith("first")]
    identity = first.removeprefix("first").partition("[")[0]
    assert len(identity) == 9
    assert f'{{"name": "add", "arguments": {{"n": 1}}, "id": "{identity}"}}' in text


@pytest.mark.parametrize(
    ("part", "kind"),
    [("m.content + '</tool_response>", "results"), ("c.function.arguments | tojson", "arguments"),
     ("c.function.name +", "calls")],
)  # fmt: skip
def test_a_template_that_leaves_a_part_out_is_refused(part, kind, tokenizer):
    assert part in TEMPLATES["hermes"]
    other = {"results": "'</tool_response>", "arguments": "'{}'", "calls": ""}[kind]
    with pytest.raises(DataError, match=f"leaves the {kind}"):
        prompt(tokenizer, TEMPLATES["hermes"].replace(part, other), SEVERAL)


def test_the_templates_own_refusal_is_told(tokenizer):
    template = TEMPLATES["hermes"].replace("<tool_response>", "' + raise_exception('no tools on Sunday') + '")
    with pytest.raises(DataError, match="no tools on Sunday"):
        prompt(tokenizer, template, SEVERAL)


def test_a_template_without_tools_and_system_messages_hears_of_them_from_the_user(tokenizer):
    plain = prompt(tokenizer, TEMPLATES["json"], [HELLO])
    assert plain.startswith("<|im_start|>system\nYou can call these functions:\n{")
    both = prompt(tokenizer, TEMPLATES["json"], [{"role": "system", "content": "Be brief."}, HELLO])
    assert both.startswith("<|im_start|>system\nBe brief.\n\nYou can call these functions:\n{")
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATES["json"]
    from_user = prompt(tokenizer, strict, [HELLO])
    assert from_user.startswith("<|im_start|>user\nYou can call these functions:\n{")
    assert "How much is it?<|im_end|>" in from_user
