"""Formats: detection, column mapping, conversion, and rows that do not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.core.errors import DataError
from haori.data.conversation import ROLES, Conversation
from haori.data.formats import converter_for
from haori.data.readers import RawRow
from haori.data.section import Columns, TextSection

QA = [("user", "q"), ("assistant", "a")]


def convert(values, **section):
    row = RawRow("f.jsonl:3", "f.jsonl", values)
    name, _, converter = converter_for(TextSection(path="f.jsonl", **section), values, "f.jsonl")
    return name, converter(row)


def turns(conversation: Conversation):
    return [(m["role"], m["content"]) for m in conversation.messages]


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages", QA),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", QA),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "sharegpt", QA),
        ({"instruction": "q", "output": "a"}, "alpaca", QA),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", QA),
        ({"instruction": "q", "input": "x", "output": "a"}, "alpaca", [("user", "q\n\nx"), ("assistant", "a")]),
        ({"instruction": "q", "output": "a", "history": [["h", "i"]]}, "alpaca",
         [("user", "h"), ("assistant", "i"), *QA]),
        ({"prompt": "q", "completion": "a", "id": 5}, "prompt-completion", QA),
        ({"Prompt ": "q", "Completion": "a"}, "prompt-completion", QA),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
         "prompt-completion", QA),
        ({"query": "q", "response": "a"}, "query-response", QA),
        ({"question": "q", "answer": "a"}, "query-response", QA),
        ({"input": "q", "output": "a"}, "query-response", QA),
        ({"system": "s", "prompt": "q", "completion": "a"}, "prompt-completion", [("system", "s"), *QA]),
        ({"system": "s", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
         "messages", [("system", "s"), *QA]),
    ],
)  # fmt: skip
def test_formats_are_detected(values, name, expected):
    found, conversation = convert(values)
    assert found == name
    assert turns(conversation) == expected
    assert conversation.origin == "f.jsonl:3"
    assert convert(values, format=name)[1] == conversation


def test_text_format():
    name, conversation = convert({"text": "hello"})
    assert (name, conversation.text, conversation.messages) == ("text", "hello", ())


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    _, row = convert({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]})
    assert turns(row) == [("user", "ab"), ("assistant", "c")]


def test_loss_flags():
    def flags(*last):
        messages = [{"role": "user", "content": "q", "loss": False}]
        messages += [{"role": "assistant", "content": "a", **flag} for flag in last]
        return [m.get("loss") for m in convert({"messages": messages})[1].messages]

    assert flags({"loss": False}, {"loss": True}, {}) == [None, False, None, None]
    assert flags({"weight": 0}, {"weight": 1}) == [None, False, None]


def test_column_mapping():
    pair = {"Frage": "q", "Antwort": "a", "Rolle": "s"}
    name, row = convert(pair, columns=Columns(prompt="Frage", completion="Antwort", system="Rolle"))
    assert (name, turns(row)) == ("prompt-completion", [("system", "s"), *QA])
    assert convert({"Absatz": "t"}, columns=Columns(text="Absatz"))[1].text == "t"
    chat = {"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert turns(convert(chat, columns=Columns(messages="chat"))[1]) == QA


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"columns": Columns(prompt="Frag", completion="Antwort")}, ["'Frag'", "did you mean 'Frage'"]),
        ({"columns": Columns(prompt="Frage")}, ["must name a prompt and a completion"]),
        ({"columns": Columns(text="Frage", system="Antwort")}, ["must name"]),
        ({"columns": Columns(text="Frage"), "format": "messages"}, ["'text'", "'messages'", "drop one"]),
        ({"format": "alpaca"}, ["'Frage', 'Antwort'", "needs instruction and output"]),
        ({}, ["'Frage', 'Antwort'", "fit no known format", "--set data.columns.prompt=Frage",
              "--set data.columns.completion=Antwort"]),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit(section, words):
    with pytest.raises(DataError) as caught:
        convert({"Frage": "q", "Antwort": "a"}, **section)
    for word in words:
        assert word in str(caught.value)


def test_near_column_names_are_named():
    with pytest.raises(DataError, match="'promt' is near 'prompt'; 'complete' is near 'completion'"):
        convert({"promt": "q", "complete": "a"})


def test_preference_data_is_recognised_and_refused():
    with pytest.raises(DataError, match="preference pairs"):
        convert({"prompt": "q", "chosen": "a", "rejected": "b"})


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"prompt": "q", "completion": 5}, "completion", "must be text, not int 5"),
        ({"prompt": "q", "completion": ["a"]}, "completion[0]", "must be an object"),
        ({"text": ["a"]}, "text", "must be text, not list"),
        ({"messages": "hello"}, "messages", "list of messages"),
        ({"messages": ["hello"]}, "messages[0]", "must be an object"),
        ({"messages": [{"role": "boss", "content": "q"}]}, "messages[0].role", "'boss' is not a known role"),
        ({"messages": [{"content": "q"}]}, "messages[0].role", "role is missing"),
        ({"messages": [{"role": 1, "content": "q"}]}, "messages[0].role", "not a known role"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "messages[1].content", "int 5"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "missing"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]},
            "messages[1].content[0]",
            "parts",
        ),
        ({"messages": [USER]}, "messages", "last message must be the assistant's, not the user's"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a", "loss": "no"}]},
            "messages[1].loss",
            "true or false",
        ),
        ({"messages": [{**USER, "loss": True}]}, "messages[0].loss", "only an assistant's"),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "messages[1].tool_calls[0]",
            "a call must be",
        ),
        ({"prompt": "q", "completion": "a", "tools": [{}]}, "tools[0]", "this is no function"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "conversations[0].from", "'alien'"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "history", "pairs"),
    ],
)
def test_broken_rows_name_file_row_and_field(values, field, words):
    with pytest.raises(DataError) as caught:
        convert(values)
    message = str(caught.value)
    assert message.startswith(f"f.jsonl:3:{field}: ")
    assert words in message
    assert "the row is {" in message
    assert "\n" not in message


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "loss", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "text", "system", "instruction", "output"]
)


@given(values=st.dictionaries(names, json_like, max_size=4))
def test_any_row_is_converted_or_refused_with_a_sentence(values):
    try:
        _, row = convert(values)
    except DataError as error:
        assert "\n" not in str(error)
        return
    assert row.text is not None or not row.messages or row.messages[-1]["role"] == "assistant"
    assert all(m["role"] in ROLES and isinstance(m["content"], str) for m in row.messages)


def test_json_round_trip_and_hash():
    _, row = convert({"messages": [USER, {"role": "assistant", "content": "ä", "loss": False}]})
    again = Conversation.from_json(row.to_json(), "elsewhere:9")
    assert again.messages == row.messages
    assert again.hash == row.hash
    assert Conversation.from_json(Conversation((), "x", text="t").to_json(), "x").text == "t"
