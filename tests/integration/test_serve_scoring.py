"""Evaluation harnesses score texts over `/v1/completions`: they read what transformers and PEFT compute."""

import httpx
import pytest
import torch

from haori.bases import find_base
from haori.library import inspect_adapter
from tests.integration.test_serve_openai import client_of
from tests.library_samples import stock_lora
from tests.server_samples import RepeatingEngine, SmallDirectory, served

MIXES = {
    "tiny": {}, "support": {"support": 1.0}, "support:-0.5": {"support": -0.5},
    "support:0.4+other-one:0.6": {"support": 0.4, "other-one": 0.6},
}  # fmt: skip
PAIRS = [("hello", " you there"), ("The weather", " is très bien in 京都, y'know"), ("a" * 60, "b" * 30), ("x", "y")]


@pytest.fixture(scope="module")
def folders(tiny_base_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    return {
        name: stock_lora(tiny_base_folder, place / name, seed=seed, r=4, target_modules="all-linear")
        for seed, name in enumerate(["support", "other-one"], start=1)
    }


@pytest.fixture(scope="module")
def server(tiny_base_folder, folders, tmp_path_factory):
    from haori.serve import EngineLimits, open_engine

    def files_of(adapter):
        return inspect_adapter(folders[adapter.removeprefix("sha256:")])

    engine = open_engine(
        find_base(str(tiny_base_folder)), files_of, EngineLimits(context_length=512, chunk_tokens=32),
        weights="fp32", cache_bytes=16 << 20,
    )  # fmt: skip
    with served(engine, SmallDirectory(), home=tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def truth(tiny_base_folder, folders):
    """Log-probabilities (T V) by stock transformers and PEFT, strengths as PEFT's scaling."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    def compute(ids, mix):
        model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
        for number, name in enumerate(mix):
            if number == 0:
                model = PeftModel.from_pretrained(model, folders[name], adapter_name=name)
            else:
                model.load_adapter(folders[name], name)
        if mix:
            model.base_model.set_adapter(list(mix))
        for module in model.modules():
            for name in mix if isinstance(module, LoraLayer) else ():
                module.scaling[name] *= mix[name]
        with torch.no_grad():
            return model.eval()(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    return compute


@pytest.fixture
def client(server):
    with client_of(server, strict=False) as client:
        yield client


def ask(server, **fields):
    reply = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", **fields}, timeout=60)
    return reply.json() if reply.status_code == 200 else reply.json()["error"]


def scores_read_by_lm_eval(choice, context):
    """Return sum and greediness of a continuation as lm-evaluation-harness 0.4's `local-completions` reads them."""
    found = choice["logprobs"]["token_logprobs"][context:-1]
    tops = choice["logprobs"]["top_logprobs"][context:-1]
    return sum(found), all(one == max(top.values()) for one, top in zip(found, tops, strict=True))


@pytest.mark.parametrize("model", MIXES)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_harness_scores_as_peft_does(server, truth, tiny_tokenizer, model, as_text):
    contexts = [tiny_tokenizer(context)["input_ids"] for context, _ in PAIRS]
    wholes = [tiny_tokenizer(context + rest)["input_ids"] for context, rest in PAIRS]
    prompt = ["".join(pair) for pair in PAIRS] if as_text else wholes
    reply = ask(server, model=model, prompt=prompt, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    for choice, context, whole in zip(reply["choices"], contexts, wholes, strict=True):
        table, begin = truth(whole, MIXES[model]), len(context)
        parts = [table[place - 1, whole[place]].item() for place in range(begin, len(whole))]
        total, greedy = scores_read_by_lm_eval(choice, begin)
        assert total == pytest.approx(sum(parts), abs=1e-4 * len(parts))
        assert greedy == all(int(table[p - 1].argmax()) == whole[p] for p in range(begin, len(whole)))
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        wanted = [table[place - 1, whole[place]].item() for place in range(1, len(whole))]
        assert found["token_logprobs"][1:-1] == pytest.approx(wanted, abs=1e-4)
        assert found["token_logprobs"][-1] == pytest.approx(table[-1].max().item(), abs=1e-4)
        assert len({len(found[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
    assert reply["usage"]["completion_tokens"] == 4
    assert reply["usage"]["prompt_tokens"] == sum(map(len, wholes))


@pytest.mark.parametrize("prompt", ["The weather is très bien in 京都", "x"])
def test_no_token_gives_only_the_prompt(server, client, truth, tiny_tokenizer, prompt):
    ids = tiny_tokenizer(prompt)["input_ids"]
    for given in (prompt, ids):
        reply = client.completions.create(model="support", prompt=given, max_tokens=0, logprobs=2, echo=True)
        [choice] = reply.choices
        assert (choice.text, choice.finish_reason, reply.usage.completion_tokens) == (prompt, "length", 0)
        table = truth(ids, MIXES["support"])
        wanted = [table[place, token].item() for place, token in enumerate(ids[1:])]
        assert choice.logprobs.token_logprobs == [None, *(pytest.approx(value, abs=1e-4) for value in wanted)]
        for place, top in enumerate(choice.logprobs.top_logprobs[1:]):
            assert sorted(top.values())[-2:] == pytest.approx(sorted(table[place].topk(2).values.tolist()), abs=1e-4)
        # Each token begins where its text stands.
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            assert token.startswith("bytes:") or choice.text[offset:].startswith(token)


@pytest.mark.parametrize("prompt", [["hello", "京都 is"], [[40, 41, 42], [228, 40, 41, 1, 40]]])
def test_an_echo_stands_before_each_answer_and_offsets_go_on(client, tiny_tokenizer, prompt):
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 5, "temperature": 0, "n": 2}
    given = [one if isinstance(one, str) else tiny_tokenizer.decode(one) for one in prompt]
    counts = [len(tiny_tokenizer(one)["input_ids"] if isinstance(one, str) else one) for one in prompt]
    plain = client.completions.create(**asked)
    for logprobs in (None, 0, 2):
        echoed = client.completions.create(**asked, echo=True, logprobs=logprobs)
        assert [choice.index for choice in echoed.choices] == [0, 1, 2, 3]
        for one, other in zip(echoed.choices, plain.choices, strict=True):
            assert one.text == given[one.index // 2] + other.text
            if logprobs is None:
                assert one.logprobs is None
                continue
            assert one.logprobs.text_offset[counts[one.index // 2]] == len(given[one.index // 2])
            assert (one.logprobs.top_logprobs is None) == (logprobs == 0)
        streamed = {}
        with client.completions.create(**asked, echo=True, logprobs=logprobs, stream=True) as stream:
            for chunk in stream:
                [choice] = chunk.choices
                text, found = streamed.setdefault(choice.index, ["", []])
                streamed[choice.index][0] = text + choice.text
                found += choice.logprobs.token_logprobs if choice.logprobs else []
        for choice in echoed.choices:
            text, found = streamed[choice.index]
            assert text == choice.text
            assert found == (choice.logprobs.token_logprobs if choice.logprobs else [])


def test_prompt_logprobs_are_vllms(server, truth, tiny_tokenizer):
    ids = tiny_tokenizer("hello you")["input_ids"]
    for fields in ({"max_tokens": 2}, {"max_tokens": 0}, {"max_tokens": 0, "echo": True, "logprobs": 0}):
        [choice] = ask(server, model="support", prompt=ids, prompt_logprobs=3, **fields)["choices"]
        table = truth(ids, MIXES["support"])
        places = choice["prompt_logprobs"]
        assert places[0] is None
        assert len(places) == len(ids)
        for row, token, at in zip(table, ids[1:], places[1:], strict=False):
            assert len(at) in (3, 4)
            for key, one in at.items():
                assert one["logprob"] == pytest.approx(row[int(key)].item(), abs=1e-4)
                assert one["rank"] == 1 + int((row > row[int(key)]).sum())
                assert one["decoded_token"] == tiny_tokenizer.decode([int(key)]) or "bytes:" in one["decoded_token"]
            assert next(iter(at)) == str(token)
    assert "prompt_logprobs" not in ask(server, prompt=ids, max_tokens=1)["choices"][0]


def test_texts_whose_tokens_look_alike_hide_no_likelier_token(tiny_tokenizer):
    from haori.serve.request import TokenLogprob
    from haori.server.openai.token_texts import TokenTexts

    texts = TokenTexts(tiny_tokenizer)
    texts.text_of = lambda token: "same"
    [top] = texts.plain([TokenLogprob(5, -2.0, ((7, -1.0),))], tops=1, offset=0).top_logprobs
    assert top == {"same": -1.0}  # a harness must not take 5 for the likeliest


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "'echo' or 'prompt_logprobs'"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "'stream'"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
        ({"max_tokens": -1, "echo": True}, "max_tokens", "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(server, fields, field, words):
    error = ask(server, prompt="hello", **fields)
    assert error["param"] == field
    assert words in error["message"]


def test_a_limit_of_the_server_leaves_prompts_alone_allowed(tiny_tokenizer, tmp_path):
    from haori.server import ServerSettings

    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path, settings=ServerSettings(max_tokens=4)) as server:
        [choice] = ask(server, prompt="abc", max_tokens=0, echo=True, logprobs=1)["choices"]
        assert choice["text"] == "abc"
        assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]
        assert ask(server, prompt="abc", echo=True)["choices"][0]["text"] == "abcabca"
