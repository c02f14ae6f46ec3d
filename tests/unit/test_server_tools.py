"""Calls of tools in answers: read the same however the text is cut, and what is no call comes out to the letter."""

import json

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from haori.core.errors import InputError
from haori.serve.sampling.constraints import Constraints
from haori.server.errors import ApiError
from haori.server.openai.chat_messages import called_turn
from haori.server.tools import CallArguments, CallBegun, CallReader, TextFound, calls_grammar, format_of
from haori.server.tools.formats import _FORMATS, _JSON

MISTRAL, HERMES, LLAMA = _FORMATS
FORMS = [MISTRAL, HERMES, LLAMA, _JSON]
NAMES = {"get_weather", "add"}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
LEAF = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(["</tool_call>", '"}]', "日本"])
)
ARGUMENTS = st.dictionaries(
    st.text(max_size=4), st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3)), max_size=3
)
CALLS = st.lists(st.tuples(st.sampled_from(sorted(NAMES)), ARGUMENTS), min_size=1, max_size=3)


def read(form, pieces, **options):
    """Return the text and the calls of an answer that comes in pieces."""
    reader = CallReader(form, NAMES, **options)
    events = [event for piece in pieces for event in reader.push(piece)] + reader.close()
    text, calls = "", []
    for event in events:
        match event:
            case TextFound(said):
                text += said
            case CallBegun(number, name):
                assert number == len(calls)
                calls.append([name, ""])
            case CallArguments(number, piece, _):
                assert number == len(calls) - 1
                calls[-1][1] += piece
    return text, [tuple(call) for call in calls]


def written(form, calls, indent=None):
    """Write calls as the family's models do, after their own templates."""
    one = [json.dumps({"name": name, form.key: arguments}, ensure_ascii=False, indent=indent)
           for name, arguments in calls]  # fmt: skip
    if form is HERMES:
        return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in one)
    if form is MISTRAL:
        return f"[TOOL_CALLS] [{', '.join(one)}]"
    return "; ".join(one) if form is LLAMA else f"[{', '.join(one)}]"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@example_settings(max_examples=40)
@given(calls=CALLS, indent=st.sampled_from([None, 2]), before=st.sampled_from(["", "Let me look.", "a {b} [c] <d>"]))
def test_calls_are_read_back_whole_and_in_any_two_pieces(form, calls, indent, before):
    text = written(form, calls, indent)
    if before and not form.bare:
        text = f"{before}\n{text}"
    else:
        before = ""
    found, read_calls = read(form, [text])
    assert found == before
    assert [(name, json.loads(arguments)) for name, arguments in read_calls] == calls
    for place in range(len(text) + 1):
        assert read(form, [text[:place], text[place:]]) == (found, read_calls)
    assert read(form, list(text)) == (found, read_calls)


SCRAPS = st.sampled_from([
    "<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[TOOL", "<|python_tag|>", "\n", " ", "{", "}", "[", "]",
    '"', "\\", ",", ";", ":", "x", "null", '{"name": "add", ', '"arguments": {}', '"parameters": {}', "日",
    '{"name": "add", "arguments": {}}', '{"name": "other", "arguments": {}}', "{'name': 'add'}",
    '{"name": "add", "arguments": {"a": 1}',
])  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@example_settings(max_examples=300)
@given(data=st.data())
def test_however_the_text_is_cut_the_same_is_found_and_without_a_call_nothing_is_lost(form, data):
    text = "".join(data.draw(st.lists(SCRAPS, max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(form, [text])
    assert read(form, pieces) == whole
    if not whole[1]:
        assert whole[0] == text
    for name, arguments in whole[1]:
        assert name in NAMES
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, 'so\n<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>\n'),
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {}, "why": "because"}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "add", "argum'),
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": NaN}}\n</tool_call>'),
        (HERMES, "<tool_call>add(1, 2)</tool_call>"),
        (HERMES, '{"name": "add", "arguments": {}}'),
        (MISTRAL, "[TOOL_CALLS] []"),
        (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {}}, {"name": "no", "arguments": {}}]'),
        (LLAMA, '{"name": "Bob", "parameters": {"age": 3}}'),
        (LLAMA, 'I call {"name": "add", "parameters": {}}'),
        (_JSON, '{"city": "Kyoto"} '),
        (_JSON, "[" * 3000),
        (_JSON, '{"name": "add", "arguments": ' + '{"a":' * 3000),
    ],
)
def test_what_is_no_call_is_text_to_the_letter(form, text):
    assert read(form, [text]) == (text, [])
    assert read(form, list(text)) == (text, [])


@pytest.mark.parametrize(
    ("form", "text", "said", "arguments"),
    [
        (HERMES, 'a <tool_call>{"arguments": {"x": "\\ud83d"}, "name": "add"}', "a", ['{"x": "\\ud83d"}']),
        (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"x\\": 1}"}</tool_call> done', " done", ['{"x": 1}']),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"x": "one\ntwo"}}</tool_call>', "", ['{"x": "one\\ntwo"}']),
        (HERMES, '<tool_call>no<tool_call>{"name": "add", "arguments": {}}</tool_call>', "<tool_call>no", ["{}"]),
        (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {}, "id": "abcdefghi"}]', "", ["{}"]),
        (MISTRAL, 'Sure. [TOOL_CALLS] {"name": "add", "arguments": {}}', "Sure.", ["{}"]),
        (LLAMA, '<|python_tag|>{"type": "function", "name": "add", "parameters": {}}', "", ["{}"]),
        (LLAMA, '{"name": "add", "parameters": {}} is the call', " is the call", ["{}"]),
        (_JSON, '\n<tool_call>\n{"name": "add", "parameters": {}}\n</tool_call>', "", ["{}"]),
    ],
)
def test_usual_departures_from_the_form_are_read(form, text, said, arguments):
    found, calls = read(form, [text])
    assert (found, [of for _, of in calls]) == (said, arguments)
    assert read(form, list(text)) == (found, calls)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_only_so_many_calls_as_are_wanted_are_read(form):
    text = written(form, [("add", {"a": 1}), ("add", {"a": 2})])
    assert read(form, [text], most=1) == ("", [("add", '{"a": 1}')])
    assert read(form, list(text), most=1, kept=True) == ("", [("add", '{"a": 1}')])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_arguments_that_are_kept_to_a_schema_come_as_they_are_written(form):
    text = written(form, [("add", {"a": "bc"}), ("add", {"a": "d"})])
    reader = CallReader(form, NAMES, kept=True)
    place = text.index("bc")
    first = reader.push(text[:place])
    assert [event for event in first if isinstance(event, CallBegun)] == [CallBegun(0, "add")]
    assert reader.push("b") == [CallArguments(0, "b", False)]
    assert reader.cut_off
    rest = reader.push(text[place + 1 :]) + reader.close()
    assert [event for event in rest if isinstance(event, CallBegun)] == [CallBegun(1, "add")]
    assert not [event for event in rest if isinstance(event, TextFound)]
    assert not reader.cut_off
    assert read(form, list(text), kept=True) == ("", [("add", '{"a": "bc"}'), ("add", '{"a": "d"}')])


def test_json_that_is_kept_to_another_schema_is_text():
    for form in FORMS:
        assert read(form, list('{"answer": [1]}'), kept=True) == ('{"answer": [1]}', [])


def follows(constraints, tokenizer, grammar, text):
    """Say whether a grammar allows a text, and whether it may end there."""
    matcher = constraints.compile_grammar(grammar)
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not matcher.allowed()[token]:
            return False
        matcher.accept(token)
    return matcher.finished or bool(matcher.allowed()[tokenizer.eos_token_id])


@pytest.fixture(params=["letters", "tokens"])
def tokenizer(request, tiny_base_folder):
    """A tokenizer to which the marks are letters, or tokens of their own, special and not."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(tiny_base_folder)
    if request.param == "tokens":
        found.add_tokens(["[TOOL_CALLS]", "<|python_tag|>"], special_tokens=True)
        found.add_tokens(["<tool_call>", "</tool_call>"])
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_certain_call_has_the_form_and_fits_the_schema(form, tokenizer):
    pytest.importorskip("llguidance")
    constraints = Constraints(tokenizer)
    grammar = calls_grammar(form, {"get_weather": CITY, "add": {"type": "object"}}, tokenizer, several=True)
    one, two = ("get_weather", {"city": "Kyoto"}), ("add", {"a": [1]})
    assert follows(constraints, tokenizer, grammar, written(form, [one]))
    assert follows(constraints, tokenizer, grammar, written(form, [one, two]))
    single = calls_grammar(form, {"get_weather": CITY}, tokenizer, several=False)
    assert follows(constraints, tokenizer, single, written(form, [one]))
    for wrong in (
        "", "Kyoto", written(form, [one, one]), written(form, [("get_weather", {"town": "Kyoto"})]),
        written(form, [two]), written(form, [("get_weather", {"city": "Kyoto, in the west"})]),
        written(form, [one])[:-1],
    ):  # fmt: skip
        assert not follows(constraints, tokenizer, single, wrong), wrong


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_text_may_come_instead_but_a_call_that_begins_fits(form, tokenizer):
    pytest.importorskip("llguidance")
    constraints = Constraints(tokenizer)
    grammar = calls_grammar(form, {"get_weather": CITY}, tokenizer, several=True, otherwise="text")
    call, wrong = (written(form, [("get_weather", {key: "Kyoto"})]) for key in ("city", "town"))
    for text in ("", "It rains.\nReally {", call):
        assert follows(constraints, tokenizer, grammar, text), text
    assert not follows(constraints, tokenizer, grammar, wrong)
    if not form.bare:
        assert follows(constraints, tokenizer, grammar, f"I look.\n{call}")
        assert not follows(constraints, tokenizer, grammar, f"I look.\n{wrong}")
    other = calls_grammar(form, {"get_weather": CITY}, tokenizer, several=True, otherwise={"type": "array"})
    for text, fits in (("[1, 2]", True), (call, True), (wrong, False), ("It rains.", False)):
        if not (form is _JSON and text == wrong):  # a list, which is what else may come
            assert follows(constraints, tokenizer, other, text) is fits, text


@pytest.mark.parametrize(
    ("template", "name"),
    [("{{ tools }} <tool_call>", "hermes"), ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"), ("<|python_tag|>", "llama"),
     ("role: ipython", "llama"), ("{{ messages }}", "json")],
)  # fmt: skip
def test_the_template_tells_the_form(template, name, tiny_base_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)
    tokenizer.chat_template = template
    assert format_of(tokenizer).name == name
    tokenizer.chat_template = template + " <function="
    with pytest.raises(InputError, match="<function="):
        format_of(tokenizer)


@pytest.mark.parametrize("arguments", ['{"x": NaN}', '{"x": -Infinity}', '{"x": 1e999}', "[1]", ""])
def test_arguments_that_are_no_json_object_are_refused(arguments):
    """NaN and infinity are no JSON, and would stand in the prompt as no model has seen them."""
    with pytest.raises(ApiError, match="JSON of an object"):
        called_turn("call_1", "f", arguments, "messages[1]")
    assert called_turn("call_1", "f", '{"x": 1.5}', "messages[1]")["function"]["arguments"] == {"x": 1.5}
