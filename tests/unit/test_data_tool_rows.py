"""Rows with tools: how they are spelt, and that training has the prompt of a request."""

import json

import pytest

from haori.core.errors import DataError
from haori.data import Conversation, PromptFormat, read_conversations, render_row
from haori.data.section import TextSection
from tests.tool_bases import MARKS, TEMPLATES

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": PARAMETERS}}
SYSTEM = {"role": "system", "content": "Be brief."}


def called(identity, city):
    return {"id": identity, "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


ASK = {"role": "user", "content": "Rain in Oslo?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [called("call_0", "Oslo")]}
RESULT = {"role": "tool", "content": "wet", "tool_call_id": "call_0", "name": "weather"}
ANSWER = {"role": "assistant", "content": "Yes."}
WHOLE = [ASK, CALL, RESULT, ANSWER]
AGAIN = [*WHOLE, {"role": "user", "content": "And Rome?"},
         {"role": "assistant", "content": "I look.", "tool_calls": [called("call_1", "Rome")]},
         {"role": "tool", "content": "dry", "tool_call_id": "call_1", "name": "weather"},
         {"role": "assistant", "content": "No."}]  # fmt: skip


@pytest.fixture(params=TEMPLATES)
def tokenizer(tiny_base_folder, request):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)
    for mark, special in MARKS[request.param].items():
        tokenizer.add_tokens([mark], special_tokens=special)
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def stretches(row):
    """The token ids before each trained stretch, and the stretch."""
    found, start = [], None
    for place, label in enumerate([*row.labels, -100]):
        if label != -100 and start is None:
            start = place
        elif label == -100 and start is not None:
            found.append((row.input_ids[:start], row.input_ids[start:place]))
            start = None
    return found


@pytest.mark.parametrize("turns", [WHOLE, [SYSTEM, *WHOLE], AGAIN, WHOLE[:2]])
@pytest.mark.parametrize("tools", [(TOOL,), ()])
def test_each_answer_is_trained_after_the_prompt_that_a_request_gets(tokenizer, turns, tools):
    row = render_row(tokenizer, Conversation(tuple(turns), "x:1", tools=tools))
    served = PromptFormat(tokenizer)
    prompts = [served.tool_prompt(turns[:place], tools) for place, turn in enumerate(turns)
               if turn["role"] == "assistant"]  # fmt: skip
    trained = stretches(row)
    assert len(trained) == len(prompts)
    apart = bool(row.texts_apart)  # a text that the template shows only as a turn before its call
    for place, ((before, _), prompt) in enumerate(zip(trained, prompts, strict=True)):
        if apart and place == 2:
            assert tokenizer.decode(before).startswith(tokenizer.decode(prompt) + "I look.")
        else:
            assert before == prompt
    assert '"Oslo"' in tokenizer.decode(trained[0][1])
    assert tokenizer.decode(trained[0][1]).endswith("<|im_end|>")
    assert ("Tells." in tokenizer.decode(row.input_ids)) == bool(tools)


def test_a_template_of_single_calls_is_taught_them_one_by_one(tokenizer):
    turns = [ASK, {"role": "assistant", "content": "", "tool_calls": [called("a", "Oslo"), called("b", "Rome")]},
             {"role": "tool", "content": "wet", "tool_call_id": "a", "name": "weather"},
             {"role": "tool", "content": "dry", "tool_call_id": "b", "name": "weather"}, ANSWER]  # fmt: skip
    trained = stretches(render_row(tokenizer, Conversation(tuple(turns), "x:1", tools=(TOOL,))))
    single = "length != 1" in tokenizer.chat_template
    assert len(trained) == (3 if single else 2)
    assert trained[-1][0] == PromptFormat(tokenizer).tool_prompt(turns[:-1], (TOOL,))
    if single:
        assert "wet" in tokenizer.decode(trained[1][0])
        assert '"Rome"' in tokenizer.decode(trained[1][1])


def test_an_answer_kept_from_loss_stays_context(tokenizer):
    turns = [ASK, {**CALL, "loss": False}, RESULT, ANSWER]
    [(before, answer)] = stretches(render_row(tokenizer, Conversation(tuple(turns), "x:1", tools=(TOOL,))))
    assert before == PromptFormat(tokenizer).tool_prompt(turns[:3], (TOOL,))
    assert "Yes." in tokenizer.decode(answer)


def test_blocks_of_a_template_that_knows_tools_say_what_is_trained(tokenizer):
    row = Conversation(tuple(WHOLE), "x:1", tools=(TOOL,))
    plain = render_row(tokenizer, row)
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace(
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
        "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}",
    )
    if tokenizer.chat_template == template:  # it is written in another way
        pytest.skip("this template has no such place")
    assert stretches(render_row(tokenizer, row)) == stretches(plain)


NAMELESS = {"name": "weather", "arguments": {"city": "Oslo"}}
BARE = TOOL["function"]
SPELT = {
    "openai": {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "tool", "tool_call_id": "call_0", "content": "wet"}, ANSWER], "tools": [TOOL]},
    "objects": {"messages": [ASK, {"role": "assistant", "tool_calls": [{"type": "function", "function": NAMELESS}]},
                             {"role": "tool", "name": "weather", "content": "wet"}, ANSWER], "tools": [TOOL]},
    "bare": {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [NAMELESS]},
                          {"role": "tool", "content": "wet"}, ANSWER], "tools": [BARE]},
    "legacy": {"messages": [ASK, {"role": "assistant", "content": None, "function_call": {
        "name": "weather", "arguments": '{"city": "Oslo"}'}}, {"role": "function", "name": "weather",
                                                                "content": "wet"}, ANSWER], "functions": [BARE]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASK["content"]},
                 {"from": "function_call", "value": json.dumps(NAMELESS)}, {"from": "observation", "value": "wet"},
                 {"from": "gpt", "value": "Yes."}], "tools": json.dumps([BARE])},
    "json": {"messages": json.dumps(WHOLE), "tools": json.dumps([TOOL])},
    "lists": {"messages": {"role": ["user", "assistant", "tool", "assistant"],
                           "content": [ASK["content"], "", "wet", "Yes."],
                           "tool_calls": [None, [NAMELESS], None, None]}, "tools": [TOOL]},
    "prompt": {"prompt": [ASK], "completion": WHOLE[1:], "tools": [TOOL]},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELT)
def test_every_spelling_is_the_same_row(spelling, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(SPELT[spelling]) + "\n", encoding="utf-8")
    [row], report = read_conversations(TextSection(path=str(path)))
    assert list(row.messages) == WHOLE
    assert row.tools == (TOOL,)
    assert not report.notes
    assert Conversation.from_json(row.to_json(), row.origin) == row
    assert row.hash != Conversation(row.messages, row.origin).hash


def test_structs_of_parquet_have_no_more_fields_than_they_were_given(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    other = {
        "name": "add",
        "description": "",
        "parameters": {"type": "object", "properties": {"n": {"type": "number"}}},
    }
    rows = [
        {"messages": WHOLE, "tools": [TOOL]},
        {
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "add", "arguments": {"n": 1}}}],
                },
            ],
            "tools": [{"type": "function", "function": other}],
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (first, second), _ = read_conversations(TextSection(path=str(tmp_path / "rows.parquet")))
    assert list(first.messages) == WHOLE
    assert first.tools == (TOOL,)
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"n": 1}
    assert second.tools[0]["function"] == other


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tools": "a hammer"}, "rows.jsonl:1:tools: these are no tools; give a list of functions"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\]: this is no function"),
        ({"tools": [TOOL, TOOL]}, "the function 'weather' is there twice"),
        ({"messages": [ASK, {**CALL, "tool_calls": [{"id": "x"}]}]}, r"messages\[1\].tool_calls\[0\]: a call must be"),
        ({"messages": [ASK, {**CALL, "tool_calls": [{"name": "f", "arguments": "no"}]}]}, "the JSON of one, not no"),
        ({"messages": [ASK, CALL, {**RESULT, "tool_call_id": "other"}, ANSWER]}, "the result of no call before it"),
        ({"messages": [ASK, CALL, {"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}, ANSWER]},
         "no call waits"),
        ({"messages": [{**ASK, "tool_calls": [NAMELESS]}, ANSWER]}, "only an assistant's message can call tools"),
        ({"messages": [ASK, {**CALL, "function_call": NAMELESS}]}, "calls are given twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_said_in_a_sentence(change, sentence, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": WHOLE, **change}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=sentence):
        read_conversations(TextSection(path=str(path)))
