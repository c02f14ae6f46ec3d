"""`haori serve` over an encoder, as a user runs it: classifiers and embeddings side by side, by vLLM's `/classify`."""

import asyncio
import json
import re
import shutil
import warnings

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForTokenClassification, AutoTokenizer

from haori.bases import find_base
from haori.library import import_adapter
from tests.classifier_adapters import stock_classifier, stock_logits, whole_classifier, write_head
from tests.encoder_models import TEXTS, adapted, build_tiny_encoder, stock_encoder, stock_vectors
from tests.serving_process import said, serving

TARGETS = ["query", "value", "dense"]
LABELS = {"mood": 2, "topic": 3, "tags": 4}
NEAR = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A home with an adapter that embeds, the encoder's folder, and a folder of classifiers to load."""
    from haori.core.settings import settings

    home, root = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("root")
    base = build_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny-encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(home))
        settings.cache_clear()
        for seed, (name, count) in enumerate(LABELS.items(), start=1):
            stock_classifier(
                base, root / name, labels=count, seed=seed, multi_label=name == "tags", target_modules=TARGETS
            )
        plain = stock_encoder(base, root / "plain", seed=9)
        import_adapter(plain, find_base(str(base)), name="plain")
        import_adapter(root / "topic", find_base(str(base)), name="kept")
        yield home, base, root
    settings.cache_clear()


@pytest.fixture(scope="module")
def server(place):
    """The address and the process of a server that has all of them."""
    home, base, root = place
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(home))
        with serving("--base", base, "--adapter-root", root) as (process, url, _):
            for name in LABELS:
                loaded = httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name})
                assert loaded.status_code == 200, loaded.text
            yield url, process
            assert "Traceback" not in said(process)


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server[0], timeout=60) as made:
        yield made


def probabilities(base, root, name, texts=TEXTS):
    exact = stock_logits(base, root / name, LABELS[name], texts).double()
    return exact.sigmoid() if name == "tags" else exact.softmax(1)


def probs(reply):
    assert reply.status_code == 200, reply.text
    return torch.tensor([item["probs"] for item in reply.json()["data"]], dtype=torch.float64)


@pytest.mark.parametrize("name", LABELS)
def test_each_classifier_answers_in_vllms_form(client, place, name):
    _, base, root = place
    reply = client.post("/classify", json={"model": name, "input": list(TEXTS), "request_id": "7"})
    wanted = probabilities(base, root, name)
    torch.testing.assert_close(probs(reply), wanted, **NEAR)
    found = reply.json()
    assert list(found) == ["id", "object", "created", "model", "data", "usage"]
    assert (found["id"], found["object"], found["model"]) == ("classify-7", "list", name)
    assert [item["index"] for item in found["data"]] == list(range(len(TEXTS)))
    assert [item["label"] for item in found["data"]] == [f"label {i}" for i in wanted.argmax(1).tolist()]
    assert {item["num_classes"] for item in found["data"]} == {LABELS[name]}
    count = sum(len(text.split()) + 2 for text in TEXTS)
    assert found["usage"] == {
        "prompt_tokens": count, "total_tokens": count, "completion_tokens": 0, "prompt_tokens_details": None,
    }  # fmt: skip


def test_a_classifier_of_the_library_is_asked_for_like_any_adapter(client, place):
    _, base, root = place
    for model in ("kept", "kept@1", "kept:1.0"):
        found = client.post("/classify", json={"model": model, "input": list(TEXTS)})
        torch.testing.assert_close(probs(found), probabilities(base, root, "topic"), **NEAR)
        assert {item["label"] for item in found.json()["data"]} <= {"label 0", "label 1", "label 2"}


def test_what_vllms_clients_send_is_taken(client, place):
    _, base, root = place
    ids = AutoTokenizer.from_pretrained(base)(list(TEXTS))["input_ids"]
    wanted = probabilities(base, root, "mood")
    ask = {"model": "mood"}
    torch.testing.assert_close(probs(client.post("/classify", json={**ask, "input": TEXTS[0]})), wanted[:1], **NEAR)
    torch.testing.assert_close(probs(client.post("/classify", json={**ask, "input": ids})), wanted, **NEAR)
    torch.testing.assert_close(probs(client.post("/classify", json={**ask, "input": ids[1]})), wanted[1:2], **NEAR)
    more = {"add_special_tokens": True, "priority": 0, "user": "me", "truncation_side": "right", "padding": None}
    torch.testing.assert_close(probs(client.post("/classify", json={**ask, "input": ids, **more})), wanted, **NEAR)
    raw = client.post("/classify", json={**ask, "input": list(TEXTS), "use_activation": False})
    torch.testing.assert_close(probs(raw), stock_logits(base, root / "mood", 2).double(), **NEAR)
    long = "cat " * 80
    cut = client.post("/classify", json={**ask, "input": long, "truncate_prompt_tokens": -1})
    torch.testing.assert_close(probs(cut), probabilities(base, root, "mood", ["cat " * 62]), **NEAR)
    assert cut.json()["usage"]["prompt_tokens"] == 64  # what the base reads, and more than it embeds
    cut = client.post("/classify", json={**ask, "input": TEXTS[0], "truncate_prompt_tokens": 4})
    torch.testing.assert_close(probs(cut), probabilities(base, root, "mood", ["the cat"]), **NEAR)


def test_many_clients_of_classifiers_and_embeddings_at_once(client, server, place):
    _, base, root = place
    wanted = {name: probabilities(base, root, name) for name in LABELS}
    vectors = stock_vectors(base, adapted(base, root / "plain"))
    names = [*LABELS, "plain"]

    async def crowd(count):
        async with httpx.AsyncClient(base_url=server[0], timeout=60) as many:
            asked = [names[number % len(names)] for number in range(count)]
            replies = await asyncio.gather(*(
                many.post("/v1/embeddings" if name == "plain" else "/classify", json={"model": name, "input": TEXTS})
                for name in asked
            ))  # fmt: skip
            return list(zip(asked, replies, strict=True))

    for name, reply in asyncio.run(crowd(48)):
        if name == "plain":
            found = torch.tensor([item["embedding"] for item in reply.json()["data"]])
            torch.testing.assert_close(found, vectors, **NEAR)
        else:
            torch.testing.assert_close(probs(reply), wanted[name], **NEAR)
    figures = client.get("/metrics").text
    assert 'haori:adapter_requests_total{adapter="topic"}' in figures
    assert 'vllm:num_requests_running{model_name="tiny-encoder"} 0' in figures


REFUSED = {
    "base": ({"model": "tiny-encoder", "input": "cat"}, r"base 'tiny-encoder' has no head"),
    "no model": ({"input": "cat"}, r"base 'tiny-encoder' has no head"),
    "embeds": ({"model": "plain", "input": "cat"}, r"does not classify.*/v1/embeddings"),
    "blend": ({"model": "mood:0.5+topic:0.5", "input": "cat"}, "cannot be mixed"),
    "blend with an adapter that embeds": ({"model": "mood+plain", "input": "cat"}, "does not classify"),
    "strength": ({"model": "mood:0.5", "input": "cat"}, "has no strength"),
    "strength 0": ({"model": "mood:0", "input": "cat"}, "has no head"),
    "messages": ({"model": "mood", "messages": [{"role": "user", "content": "cat"}]}, "give 'input'"),
    "too long": ({"model": "mood", "input": ["cat", "cat " * 80]}, r"Text 2 has 82 tokens.*at most 64"),
    "cut to nothing": ({"model": "mood", "input": "cat", "truncate_prompt_tokens": 2}, "puts 2 around each"),
    "cut to zero": ({"model": "mood", "input": "cat", "truncate_prompt_tokens": 0}, "1 to 64"),
    "cut to more": ({"model": "mood", "input": "cat", "truncate_prompt_tokens": 65}, "1 to 64"),
    "strange id": ({"model": "mood", "input": [2, 400, 3]}, "token id 400; ids of this base are 0 to 24"),
    "nothing": ({"model": "mood", "input": []}, "0 texts"),
    "empty": ({"model": "mood", "input": ["cat", ""]}, "none of them empty"),
    "mixed": ({"model": "mood", "input": ["cat", 3]}, "'input"),
    "priority": ({"model": "mood", "input": "cat", "priority": 3}, "'priority' is not supported"),
    "no field": ({"model": "mood", "input": "cat", "use_activations": False}, "use_activation"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_classified_is_a_sentence(client, kind):
    body, sentence = REFUSED[kind]
    reply = client.post("/classify", json=body)
    assert reply.status_code == 400, reply.text
    message = reply.json()["error"]["message"]
    assert re.search(sentence, message), message


def test_a_classifier_is_not_embedded_by(client):
    for model in ("mood", "mood:0.5+plain:0.5"):
        reply = client.post("/v1/embeddings", json={"model": model, "input": "cat"})
        assert reply.status_code == 400
        assert "is a classifier" in reply.json()["error"]["message"] and "/classify" in reply.text
    assert client.post("/classify", json={"model": "moot", "input": "cat"}).status_code == 404
    assert client.post("/v1/completions", json={"model": "mood", "prompt": "cat"}).status_code == 400


def test_models_lists_classifiers_and_the_log_names_them(client, server):
    listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert {*LABELS, "plain", "tiny-encoder"} <= set(listed)
    assert listed["mood"]["parent"] == "tiny-encoder"
    for name, labels in (("tags", [f"label {number}" for number in range(4)]), ("plain", None), ("tiny-encoder", None)):
        assert client.get(f"/v1/models/{name}").json().get("labels") == labels
    client.post("/classify", json={"model": "topic", "input": "the cat"}, headers={"x-request-id": "look-here"})
    lines = [json.loads(line) for line in said(server[1]).splitlines() if "look-here" in line]
    assert [(line["path"], line["model"], line["prompt_tokens"]) for line in lines] == [("/classify", "topic", 4)]


def test_what_cannot_be_served_is_refused_when_it_is_loaded(client, place, tmp_path):
    _, _, root = place
    mood = root / "mood"

    def load(name, change):
        folder = shutil.copytree(mood, root / name)
        change(folder)
        try:
            reply = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name})
        finally:
            shutil.rmtree(folder)
        assert reply.status_code == 400, (name, reply.text)
        return reply.json()["error"]["message"]

    assert "3 labels" in load("labels", lambda folder: write_head(folder, 3))
    assert "not what describes a head" in load("damaged", lambda folder: (folder / "head.json").write_text("[1"))
    other = build_tiny_encoder(tmp_path / "other", seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = get_peft_model(
            AutoModelForTokenClassification.from_pretrained(other),
            LoraConfig(target_modules=["query"], task_type="TOKEN_CLS"),
        )
        words.save_pretrained(root / "tokens")
    reply = client.post("/v1/load_lora_adapter", json={"lora_name": "tokens", "lora_path": "tokens"})
    assert reply.status_code == 400 and "`haori classify`" in reply.text


def test_the_same_weights_with_other_labels_are_another_classifier(client, place):
    _, _, root = place
    folder = shutil.copytree(root / "mood", root / "again")
    (folder / "head.json").write_text('{"kind": "sequence_classification", "labels": ["no", "yes"]}')
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": "again"}).status_code == 200
    for name, labels in (("mood", {"label 0", "label 1"}), ("again", {"no", "yes"}), ("mood", {"label 0", "label 1"})):
        reply = client.post("/classify", json={"model": name, "input": list(TEXTS)}).json()
        assert {item["label"] for item in reply["data"]} <= labels
    (folder / "head.json").unlink()  # as stock PEFT saves it
    again = {"lora_name": "again", "lora_path": "again", "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=again).status_code == 200
    assert client.post("/classify", json={"model": "again", "input": "cat"}).json()["data"][0]["label"][:6] == "LABEL_"


def test_labels_that_change_beside_the_weights_need_a_new_registration(client, place):
    _, base, root = place
    folder = stock_classifier(base, root / "moved", labels=3, seed=77, target_modules=TARGETS)
    given = {"lora_name": "moved", "lora_path": "moved"}
    assert client.post("/v1/load_lora_adapter", json=given).status_code == 200
    (folder / "head.json").write_text('{"kind": "sequence_classification", "labels": ["x", "y", "z"]}')
    ask = {"model": "moved", "input": "cat"}
    reply = client.post("/classify", json=ask)
    assert reply.status_code == 400 and "changed since the adapter was registered" in reply.text
    assert client.post("/v1/load_lora_adapter", json={**given, "load_inplace": True}).status_code == 200
    assert client.post("/classify", json=ask).json()["data"][0]["label"] in "xyz"


def test_a_base_that_is_a_classifier_answers_under_its_own_name(place, tmp_path):
    """What vLLM's example client does: the first model, four prompts, then the same as token ids."""
    _, encoder, root = place
    base = tmp_path / "classifier"
    shutil.copytree(encoder, base)
    (base / "modules.json").unlink()
    model = whole_classifier(encoder, 3)
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    model.config.label2id = {"bad": 0, "fair": 1, "good": 2}
    model.save_pretrained(base)
    adapter = stock_classifier(base, root / "own", labels=2, seed=4, target_modules=TARGETS)
    with serving("--base", base, "--adapter-root", root) as (_, url, _), httpx.Client(base_url=url) as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
        payload = {"model": name, "input": list(TEXTS)}
        found = client.post("/classify", json=payload)
        wanted = stock_logits(base, None, 3).double().softmax(1)
        torch.testing.assert_close(probs(found), wanted, **NEAR)
        labels = [("bad", "fair", "good")[i] for i in wanted.argmax(1).tolist()]
        assert [item["label"] for item in found.json()["data"]] == labels
        assert client.get(f"/v1/models/{name}").json()["labels"] == ["bad", "fair", "good"]
        ids = [client.post("/tokenize", json={"model": name, "prompt": text}).json()["tokens"] for text in TEXTS]
        again = client.post("/classify", json={"model": name, "input": ids})
        assert again.json()["data"] == found.json()["data"]
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "own", "lora_path": "own"}).status_code == 200
        mine = stock_logits(base, adapter, 2).double().softmax(1)
        torch.testing.assert_close(probs(client.post("/classify", json={**payload, "model": "own"})), mine, **NEAR)
        assert client.post("/v1/embeddings", json=payload).status_code == 200
