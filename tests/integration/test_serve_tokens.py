"""`/tokenize` and `/detokenize`, and reasoning in messages: what the model is given, by each adapter's own template."""

import copy

import httpx
import pytest

from haori.data import PromptFormat
from haori.server import KeyStore
from tests.conftest import CHATML
from tests.integration.test_serve_openai import HELLO
from tests.server_samples import RepeatingEngine, SmallDirectory, served

THINKING = (
    "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{% if m.FIELD %}{{ '<think>' + m.FIELD + '</think>' }}{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "f", "description": "What it does."}}]


class OwnTemplates(SmallDirectory):
    """Adapters with chat templates of their own: each shows reasoning by another name."""

    FIELDS = {"sha256:support": "reasoning_content", "sha256:support@2": "thinking", "sha256:other-one": "reasoning"}

    def prompt_format(self, tokenizer, mix):
        if mix:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = THINKING.replace("FIELD", self.FIELDS[mix[0][0]])
        return PromptFormat(tokenizer)


@pytest.fixture
def server(tiny_tokenizer, tmp_path):
    with served(RepeatingEngine(tiny_tokenizer), OwnTemplates(), home=tmp_path) as running:
        yield running


def ask(server, path, headers=None, **fields):
    reply = httpx.post(f"{server.url}/{path}", json=fields, headers=headers, timeout=30)
    return reply.json() if reply.status_code == 200 else {"status": reply.status_code, **reply.json()["error"]}


def test_a_text_and_back(server, tiny_tokenizer):
    for text in ("hello <|im_end|> 京都", "", "  two  spaces , here "):
        ids = tiny_tokenizer(text)["input_ids"]
        found = ask(server, "tokenize", model="tiny", prompt=text)
        assert found == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
        assert ask(server, "detokenize", tokens=ids) == {"prompt": text}
    found = ask(server, "tokenize", prompt="hello", return_token_strs=True)
    assert found["token_strs"] == tiny_tokenizer.convert_ids_to_tokens(found["tokens"])


def test_a_text_is_what_a_completion_reads_with_the_tokenizers_own_tokens_or_without(tiny_base_folder, tmp_path):
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)
    begin = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[begin]
    )
    with served(RepeatingEngine(tokenizer), home=tmp_path) as server:
        for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            found = ask(server, "tokenize", prompt="ab", **fields)["tokens"]
            assert (found[0] == tokenizer.bos_token_id) == (fields.get("add_special_tokens") is not False)
            reply = ask(
                server, "v1/completions", model="tiny", prompt="ab", echo=True, logprobs=1, max_tokens=1, **fields
            )
            assert list(server.engine.seen[-1].prompt) == found
            assert reply["choices"][0]["text"].startswith("ab")
            assert reply["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 2][-len(found) - 1 :]


@pytest.mark.parametrize("model", ["tiny", "support", "support@2:0.5"])
def test_a_conversation_is_what_a_chat_reads(server, tiny_tokenizer, model):
    for fields in ({}, {"tools": TOOLS}):
        found = ask(server, "tokenize", model=model, messages=HELLO, add_special_tokens=False, **fields)
        ask(server, "v1/chat/completions", model=model, messages=HELLO, max_tokens=1, **fields)
        assert tuple(found["tokens"]) == server.engine.seen[-1].prompt
        assert ("[assistant]" in tiny_tokenizer.decode(found["tokens"])) == (model != "tiny")


def test_keys_hold_for_tokens_too(tiny_tokenizer, tmp_path):
    store = KeyStore(tmp_path / "keys.json")
    secret = store.create("shop", adapters=("support",))[1]
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path) as server:
        key = {"Authorization": f"Bearer {secret}"}
        assert ask(server, "tokenize", prompt="a")["status"] == 401
        assert ask(server, "tokenize", key, model="support", prompt="a")["count"] == 1
        for path, fields in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [5]})):
            assert ask(server, path, key, **fields)["status"] == 403  # the base, by default
            assert ask(server, path, key, model="other-one", **fields)["status"] == 403


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        ("tokenize", {}, "prompt", "Give either 'prompt' or 'messages'"),
        ("tokenize", {"prompt": "a", "messages": HELLO}, "prompt", "Give either"),
        ("tokenize", {"prompt": "a", "tools": TOOLS}, "tools", "only for 'messages'"),
        ("tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens", "only for 'prompt'"),
        ("tokenize", {"messages": HELLO, "add_generation_prompt": False}, "add_generation_prompt", "not supported"),
        ("tokenize", {"messages": HELLO, "chat_template": "x"}, "chat_template", "not supported"),
        ("tokenize", {"prompt": "a", "model": "absent"}, "model", "no adapter 'absent'"),
        ("detokenize", {"tokens": [5, 100_000]}, "tokens", "'tokens' has the token id 100000; ids of this base are 0"),
        ("detokenize", {"tokens": [-1]}, "tokens", "has the token id -1"),
        ("detokenize", {"tokens": ["a"]}, "tokens[0]", "valid integer"),
        ("v1/chat/completions", {"model": "tiny", "messages": HELLO, "skip_special_tokens": False},
         "skip_special_tokens", "not supported"),
        ("v1/chat/completions", {"model": "tiny", "messages": HELLO, "add_generation_prompt": False},
         "add_generation_prompt", "not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_a_sentence(server, path, fields, param, words):
    error = ask(server, path, **fields)
    assert words in error["message"]
    assert error["param"] == param


def thought(name, text="ponder"):
    return [*HELLO, {"role": "assistant", "content": "hi", name: text}, *HELLO]


@pytest.mark.parametrize("model", ["support", "support@2", "other-one"])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_a_template_by_the_name_that_it_knows(server, tiny_tokenizer, model, name):
    for fields in ({}, {"tools": TOOLS}):
        ask(server, "v1/chat/completions", model=model, messages=thought(name), max_tokens=1, **fields)
        text = tiny_tokenizer.decode(server.engine.seen[-1].prompt)
        assert text.endswith("[assistant]<think>ponder</think>hi[user]hello[assistant]")
    count = len(server.engine.seen)
    ask(server, "v1/chat/completions", model=model, messages=thought(name, ""), max_tokens=1)
    assert "think" not in tiny_tokenizer.decode(server.engine.seen[count].prompt)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_never_dropped(server, name):
    assert server.engine.tokenizer.chat_template == CHATML
    for path in ("v1/chat/completions", "tokenize"):
        error = ask(server, path, model="tiny", messages=thought(name))
        assert "'messages[1]' has reasoning, of which this model's chat template shows none" in error["message"]
        assert error["param"] == "messages[1]"
        error = ask(server, path, model="support", messages=[{"role": "user", "content": "a", name: "b"}])
        assert error["message"] == f"'messages[0].{name}' is only for the assistant's messages; take it out."
    two = thought("reasoning_content")
    two[1] |= {"reasoning": "other"}
    error = ask(server, "v1/chat/completions", model="support", messages=two)
    assert error["message"] == "'messages[1].reasoning' and 'reasoning_content' differ; give one of them."
    two[1] |= {"reasoning": "ponder"}
    assert "choices" in ask(server, "v1/chat/completions", model="support", messages=two)
