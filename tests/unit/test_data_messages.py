"""Messages of other tools: roles, loss flags and reasoning, whatever their spelling, down to the trained tokens."""

import json

import pytest

from haori.core.errors import DataError
from haori.data import load_text, read_conversations
from haori.data.section import TextSection
from haori.data.template import render_prompt

ASSISTANTS = ["assistant", "Assistant", "gpt", "GPT", "bot", "model", " ai ", "chatbot", "chatgpt"]
# What the flag's own tool means by it: true where the answer is trained.
FLAGS = [
    ("loss", False, True), ("train", False, True), ("training", False, True), ("trainable", False, True),
    ("train_on_turn", False, True), ("loss_mask", 0, 1), ("weight", 0, 1), ("weight", 0.0, 1.0), ("loss", 0, 1),
    ("mask", True, False), ("mask", 1, 0), ("masked", True, False),
]  # fmt: skip

THINKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% set thought = message.FIELD if message.FIELD is string else '' %}"
    "{% if loop.last or thought %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3 has it: an empty block before an answer that comes without reasoning."""


@pytest.fixture
def thinking(tiny_base_folder):
    """Return the tiny tokenizer with a template that shows reasoning under a name."""

    def named(field):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)
        tokenizer.chat_template = THINKS.replace("FIELD", field)
        return tokenizer

    return named


def write(folder, rows, kind="jsonl"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(folder, tokenizer, rows, kind="jsonl", **section):
    return load_text(TextSection(path=write(folder, rows, kind), **section), tokenizer, context_length=256)


def trained(tokenizer, data):
    """Return the text with loss of every row, by the row's first message."""
    found = {}
    for row in [*data.train, *data.validation]:
        ids = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        found[json.loads(row["conversation"])["messages"][0]["content"]] = tokenizer.decode(ids)
    return found


@pytest.mark.parametrize("role", ASSISTANTS)
@pytest.mark.parametrize(("flag", "off", "on"), FLAGS)
def test_flags_hold_whatever_the_role_is_called(tmp_path, tiny_tokenizer, role, flag, off, on):
    rows = [
        {"conversations": [{"from": "human", "value": f"Q {i}"}, {"from": role, "value": "wrong", flag: off},
                           {"from": "human", "value": "again"}, {"from": role, "value": f"A {i}", flag: on}]}
        for i in range(3)
    ]  # fmt: skip
    data = load(tmp_path, tiny_tokenizer, rows)
    assert trained(tiny_tokenizer, data) == {f"Q {i}": f"A {i}<|im_end|>" for i in range(3)}
    assert f"Answers kept as context by their flags: {flag} (3 messages)." in data.report.notes


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_flags_in_other_files(tmp_path, tiny_tokenizer, kind):
    rows = [
        {"messages": [{"role": "user", "content": f"Q {i}", "trainable": None},
                      {"role": "model", "content": "wrong", "trainable": False},
                      {"role": "user", "content": "again", "trainable": None},
                      {"role": "model", "content": f"A {i}", "trainable": None}]}
        for i in range(3)
    ]  # fmt: skip
    data = load(tmp_path, tiny_tokenizer, rows, kind)
    assert trained(tiny_tokenizer, data) == {f"Q {i}": f"A {i}<|im_end|>" for i in range(3)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": 0.5}, "weight must be 0 or 1, not 0.5"),
        ({"train": "no"}, "train must be true or false, not no"),
        ({"loss": True, "weight": 0}, '"loss": true and "weight": 0 contradict each other'),
        ({"mask": True, "train": True}, "contradict"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "parts of a message"),
        ({"reasoning_content": 5}, "content must be text; it is int 5"),
        ({"reasoning_content": "a", "thinking": "b"}, "given twice and differs"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(tmp_path, fields, words):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **fields}]}
    with pytest.raises(DataError) as caught:
        read_conversations(TextSection(path=write(tmp_path, [row])))
    assert words in str(caught.value)
    assert "data.jsonl:1:messages[1]" in str(caught.value)


def test_flags_that_ask_to_train_the_user_are_reported(tmp_path):
    row = {"messages": [{"role": "user", "content": "q", "train": True, "mask": False},
                        {"role": "assistant", "content": "a", "train": True}]}  # fmt: skip
    _, report = read_conversations(TextSection(path=write(tmp_path, [row])))
    assert report.notes == ("Fields of messages not used: train (asks to train user turns) (1 message).",)


@pytest.mark.parametrize("role", ["tool", "function", "ipython", "observation", "tool_response"])
def test_results_of_tools_are_turns_of_the_tool(tmp_path, role):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": role, "content": "42"},
                        {"role": "assistant", "content": "a"}]}  # fmt: skip
    found, _ = read_conversations(TextSection(path=write(tmp_path, [row])))
    assert [message["role"] for message in found[0].messages] == ["user", "tool", "assistant"]


def thoughtful(field, count=3):
    return [
        {"messages": [{"role": "user", "content": f"What is {i}+1?"},
                      {"role": "assistant", field: f"Add one to {i}.", "content": f"{i + 1}"}]}
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("known", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_trained_under_the_name_the_template_knows(tmp_path, thinking, known, given):
    tokenizer = thinking(known)
    data = load(tmp_path, tokenizer, thoughtful(given))
    assert trained(tokenizer, data) == {
        f"What is {i}+1?": f"<think>\nAdd one to {i}.\n</think>\n\n{i + 1}<|im_end|>" for i in range(3)
    }
    assert not data.report.notes[1:]  # the first one says how the rows were split


def test_reasoning_in_other_forms(tmp_path, thinking):
    tokenizer = thinking("reasoning_content")
    expected = {f"What is {i}+1?": f"<think>\nAdd one to {i}.\n</think>\n\n{i + 1}<|im_end|>" for i in range(3)}
    parts = [
        {"messages": [{"role": "user", "content": f"What is {i}+1?"},
                      {"role": "assistant", "content": [{"type": "thinking", "thinking": f"Add one to {i}."},
                                                        {"type": "text", "text": f"{i + 1}"}]}]}
        for i in range(3)
    ]  # fmt: skip
    assert trained(tokenizer, load(tmp_path, tokenizer, parts)) == expected
    for column in ("reasoning", "reasoning_content", "thinking"):
        rows = [{"question": f"What is {i}+1?", column: f"Add one to {i}.", "answer": f"{i + 1}"} for i in range(3)]
        assert trained(tokenizer, load(tmp_path, tokenizer, rows, "parquet")) == expected
    both = [{"messages": [*row["messages"][:1], {**row["messages"][1], "reasoning": row["messages"][1]["thinking"]}]}
            for row in thoughtful("thinking")]  # fmt: skip
    assert trained(tokenizer, load(tmp_path, tokenizer, both)) == expected


def test_reasoning_that_no_template_shows_is_said(tmp_path, tiny_tokenizer):
    data = load(tmp_path, tiny_tokenizer, thoughtful("reasoning_content"))
    assert trained(tiny_tokenizer, data) == {f"What is {i}+1?": f"{i + 1}<|im_end|>" for i in range(3)}
    note = "Reasoning not used, since this base's chat template shows none: that of 3 messages."
    assert note in data.report.notes


def test_answers_without_reasoning_before_which_an_empty_block_is_learnt_are_counted(tmp_path, thinking):
    blank = {"role": "assistant", "content": "a", "reasoning_content": " "}
    rows = [*thoughtful("reasoning_content"), {"messages": [{"role": "user", "content": "plain"}, blank]}]
    notes = load(tmp_path, thinking("reasoning_content"), rows).report.notes
    assert any(note.startswith("Rows whose answer comes without reasoning: 1;") for note in notes)


def test_reasoning_of_other_roles_is_reported(tmp_path):
    row = {"messages": [{"role": "user", "content": "q", "thinking": "hm"}, {"role": "assistant", "content": "a"}]}
    _, report = read_conversations(TextSection(path=write(tmp_path, [row])))
    assert report.notes == ("Fields of messages not used: thinking (of user turns) (1 message).",)


def test_reasoning_is_cleaned_hashed_and_given_back(tmp_path, thinking):
    rows = [
        {"messages": [{"role": "user", "content": "q"},
                      {"role": "assistant", "content": "a", "reasoning": f"so\x00 {i}\r\n"}]}
        for i in range(2)
    ]  # fmt: skip
    found, report = read_conversations(TextSection(path=write(tmp_path, rows)))
    assert (report.duplicates, report.control_characters) == (0, 2)
    assert found[0].messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "so 0\n"}
    tokenizer = thinking("thinking")
    prompt = tokenizer.decode(render_prompt(tokenizer, [*found[0].messages, {"role": "user", "content": "more"}]))
    assert "<think>\nso 0\n</think>\n\na<|im_end|>" in prompt
