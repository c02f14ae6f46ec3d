"""The official client against a server: replies it accepts in strict mode, whole and streamed, and what they say."""

import base64
import struct

import httpx
import openai
import pytest

from haori.server import KeyStore, ServerSettings
from tests.server_samples import RepeatingEngine, TwoNumbers, served

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def server(tiny_tokenizer, tmp_path):
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path) as running:
        yield running


def client_of(server, *, strict=True):
    url = f"{server.url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, _strict_response_validation=strict, timeout=20)


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


def test_models_show_whose_child_they_are(client):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["tiny", "support", "support@2", "other-one"]
    assert models["tiny"].parent is None
    assert models["support"].parent == "tiny"
    assert models["support"].root == "/library/support"
    assert client.models.retrieve("support@2").id == "support@2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("missing")


def test_a_chat_is_rendered_with_the_template_and_counted(client, server, tiny_tokenizer):
    reply = client.chat.completions.create(model="support@2", messages=HELLO, max_tokens=5)
    [request] = server.engine.seen
    wanted = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(request.prompt) == wanted
    assert request.adapters == (("sha256:support@2", 1.0),)
    assert reply.model == "support@2"
    assert reply.system_fingerprint.startswith("fp_")
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.content == tiny_tokenizer.decode(request.prompt[:5], skip_special_tokens=True)
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(request.prompt), 5)
    assert usage.total_tokens == len(request.prompt) + 5
    assert usage.prompt_tokens_details.cached_tokens == 2


def test_a_stream_says_the_same_as_a_whole_reply(client):
    asked = {"model": "support:0.5+other-one:0.2", "messages": HELLO, "n": 2, "seed": 2, "max_tokens": 6}
    whole = client.chat.completions.create(**asked)
    texts, roles, finishes, usage = ["", ""], ["", ""], {}, None
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                roles[choice.index] += choice.delta.role or ""
                if choice.finish_reason:
                    finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]  # each choice has a seed of its own
    assert roles == ["assistant", "assistant"]
    assert finishes == {0: "length", 1: "length"}
    assert usage == whole.usage


def test_parts_of_text_are_joined_and_the_developer_is_the_system(client, server, tiny_tokenizer):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "four"},
    ]
    client.chat.completions.create(model="tiny", messages=messages)
    rendered = tiny_tokenizer.decode(server.engine.seen[0].prompt)
    assert "<|im_start|>system\nbe brief<|im_end|>" in rendered
    assert "user\none two<|im_end|>" in rendered


def test_log_probabilities_of_a_chat(client):
    asked = {"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    found = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [item.logprob for item in found] == [-9999.0, -0.5, -0.5]
    assert all(len(item.top_logprobs) == 2 for item in found)
    assert bytes(found[1].bytes).decode() == found[1].token
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == found


def test_plain_completions_of_text_and_of_token_ids(client, server):
    reply = client.completions.create(model="tiny", prompt=["ab", "cd"], n=2, max_tokens=2, logprobs=1)
    assert [choice.text for choice in reply.choices] == ["ab", "ab", "cd", "cd"]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.prompt_tokens == 4
    logprobs = reply.choices[0].logprobs
    assert logprobs.tokens == ["a", "b"]
    assert logprobs.text_offset == [0, 1]
    assert len(logprobs.top_logprobs[0]) == 2  # the likeliest, and the one that was chosen
    ids = list(server.engine.seen[0].prompt)
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=2).choices[0].text == "ab"
    assert client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=2).choices[1].text == "ab"
    assert client.completions.create(model="tiny", prompt="ab").usage.completion_tokens == 16
    # Strict clients refuse any chunk but the last, of OpenAI's own server too: their type has no null finish_reason.
    with client_of(server, strict=False) as lenient:
        chunks = list(lenient.completions.create(model="tiny", prompt="abc", max_tokens=3, stream=True, logprobs=0))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abc"
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks] == [[0], [1], [2]]


def test_every_way_to_choose_tokens_reaches_the_engine(client, server):
    extra = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 2}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0.3, top_p=0.9, presence_penalty=0.5, frequency_penalty=-0.5, seed=7,
        stop=["x", "yy"], logit_bias={"5": 1.5}, max_completion_tokens=4, user="u", metadata={"a": "b"}, store=False,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
        extra_body=extra,
    )  # fmt: skip
    sampling = server.engine.seen[0].sampling
    assert sampling.model_dump() == {
        "max_tokens": 4, "temperature": 0.3, "top_p": 0.9, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {5: 1.5}, "seed": 7, "stop": ("x", "yy"),
        "ignore_eos": True, "min_tokens": 2, "logprobs": None, "json_schema": schema,
        "grammar": None, "shown_tokens": frozenset(), "prompt_logprobs": None,
    }  # fmt: skip
    client.chat.completions.create(model="tiny", messages=HELLO, response_format={"type": "json_object"}, stop="z")
    assert server.engine.seen[1].sampling.json_schema == {}
    assert server.engine.seen[1].sampling.stop == ("z",)


def test_embeddings_need_an_encoder(client, tiny_tokenizer, tmp_path):
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="tiny", input="hello")
    with (
        served(RepeatingEngine(tiny_tokenizer), home=tmp_path, embedder=TwoNumbers()) as server,
        client_of(server, strict=False) as other,
    ):
        # The client asks for base64, which a strict one refuses before it decodes it.
        reply = other.embeddings.create(model="support", input=["one two", "b"])
        assert [item.embedding for item in reply.data] == [[7.0, float(ord("o"))], [1.0, float(ord("b"))]]
        assert reply.usage.prompt_tokens == 3
        assert 'haori:adapter_requests_total{adapter="support"} 1.0' in httpx.get(f"{server.url}/metrics").text
        body = {"model": "support", "input": "b", "encoding_format": "base64"}
        raw = httpx.post(f"{server.url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
        assert struct.unpack("<2f", base64.b64decode(raw)) == (1.0, float(ord("b")))


def test_classification_needs_an_encoder_and_keeps_to_the_limits(tiny_tokenizer, tmp_path):
    ask = {"model": "support", "input": ["one two", "b"]}
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path / "decoder") as server:
        refused = httpx.post(f"{server.url}/classify", json=ask)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "classification_not_served")
        assert "classifies nothing; serve an encoder" in refused.text
    home, settings = tmp_path / "encoder", ServerSettings(max_prompts=3)
    secret = KeyStore(home / "keys.json").create("few", adapters=["*"], tokens_per_minute=4).secret
    engine = RepeatingEngine(tiny_tokenizer)
    with (
        served(engine, home=home, embedder=TwoNumbers(), settings=settings) as server,
        httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {secret}"}) as client,
    ):
        assert httpx.post(f"{server.url}/classify", json=ask).status_code == 401
        refused = client.post("/classify", json={**ask, "input": ["a"] * 4})
        assert refused.status_code == 400 and "4 texts; one request has 1 to 3" in refused.text
        reply = client.post("/classify", json=ask)
        assert [(item["label"], item["probs"]) for item in reply.json()["data"]] == [
            ("long", [0.25, 0.75]), ("short", [0.75, 0.25]),
        ]  # fmt: skip
        client.post("/classify", json=ask)
        refused = client.post("/classify", json=ask)
        assert refused.status_code == 429 and refused.headers["retry-after"]
    assert '"path": "/classify"' in server.log.getvalue() or '"path":"/classify"' in server.log.getvalue()


def test_limits_of_the_server(tiny_tokenizer, tmp_path):
    settings = ServerSettings(max_tokens=10, max_prompt_tokens=20, max_choices=2, max_prompts=3, max_answers=4)
    with (
        served(RepeatingEngine(tiny_tokenizer), home=tmp_path, settings=settings) as server,
        client_of(server) as client,
    ):
        reply = client.chat.completions.create(model="tiny", messages=HELLO)
        assert reply.usage.completion_tokens == 10  # unless less is asked for
        for sentence, asked in {
            "at most 10": {"max_tokens": 11},
            "at most 2 are": {"n": 3},
            "at most 20 are": {"messages": [{"role": "user", "content": "word " * 30}]},
        }.items():
            with pytest.raises(openai.BadRequestError, match=sentence):
                client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **asked})
        with pytest.raises(openai.BadRequestError, match="1 to 3"):
            client.completions.create(model="tiny", prompt=["a"] * 4)
        with pytest.raises(openai.BadRequestError, match="6 answers"):
            client.completions.create(model="tiny", prompt=["a"] * 3, n=2)
        assert len(server.engine.seen) == 1


def test_a_prompt_that_fills_the_context_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="at most 255") as caught:
        client.completions.create(model="tiny", prompt=[5] * 256)
    assert caught.value.code == "context_length_exceeded"


def test_the_engine_too_busy_is_429_with_a_time(tiny_tokenizer, tmp_path):
    engine = RepeatingEngine(tiny_tokenizer, room=1)
    with served(engine, home=tmp_path) as server, client_of(server) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="ab", n=2, max_tokens=200)
        assert caught.value.response.headers["retry-after"] == "3"
        assert server.until_idle()  # the answer that had begun is ended too


def test_an_engine_that_fails_is_an_error_whole_and_streamed(client, server):
    server.engine.fail_with = "The adapter 'support' is damaged."
    with pytest.raises(openai.InternalServerError, match="damaged"):
        client.chat.completions.create(model="support", messages=HELLO)
    with pytest.raises(openai.APIError, match="damaged"):
        list(client.chat.completions.create(model="support", messages=HELLO, stream=True))
