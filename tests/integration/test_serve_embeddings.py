"""`haori serve` over an encoder, as a user runs it: embeddings with adapters and blends, and no text."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
from transformers import AutoModel

from haori.bases import find_base
from haori.library import Library, import_adapter
from tests.encoder_models import TEXTS, adapted, build_tiny_encoder, stock_encoder, stock_vectors

KINDS = {"plain": {}, "steady": {"use_rslora": True}, "turned": {"use_dora": True}}


@contextmanager
def serving(log, *arguments):
    """Yield the process, its address, and the command that it printed, once it is ready; `log` takes its log."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "haori.cli.app", "serve", "--port", "0", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        found = re.search(r"http://\S+:\d+", process.stdout.readline())
        assert found, log.read_text()
        command = process.stdout.readline().strip()
        while httpx.get(f"{found[0]}/health", timeout=60).status_code != 200:  # busy with imports
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield process, found[0], command
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A home with three adapters of one encoder: where it is, the encoder's folder, and those of the adapters."""
    from haori.core.settings import settings

    home = tmp_path_factory.mktemp("home")
    folder = build_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny-encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(home))
        settings.cache_clear()
        folders = {
            name: stock_encoder(folder, tmp_path_factory.mktemp(name), seed=seed, **options)
            for seed, (name, options) in enumerate(KINDS.items(), start=1)
        }
        for name, adapter in folders.items():
            import_adapter(adapter, find_base(str(folder)), name=name)
        yield home, folder, folders
    settings.cache_clear()


@pytest.fixture(scope="module")
def server(place, tmp_path_factory):
    """The address and the command that a serving process printed."""
    home, folder, _ = place
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(home))
        log = tmp_path_factory.mktemp("log") / "server.log"
        with serving(log, "--base", folder, "--adapter-memory", "5MB") as (_, url, command):
            yield url, command
        assert "Traceback" not in log.read_text()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def figures(url):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def embedded(client, model, texts=TEXTS):
    return torch.tensor([item.embedding for item in client.embeddings.create(model=model, input=list(texts)).data])


def test_the_printed_command_works(server):
    url, command = server
    address, body = re.search(r"curl (\S+) .* -d '(.*)'", command).groups()
    assert address == f"{url}/v1/embeddings"
    [item] = httpx.post(address, json=json.loads(body)).json()["data"]
    assert sum(value**2 for value in item["embedding"]) == pytest.approx(1.0, abs=1e-5)


def test_base_adapters_and_blends_are_stock_peft(client, place):
    _, folder, folders = place
    plain = stock_vectors(folder, AutoModel.from_pretrained(folder))
    torch.testing.assert_close(embedded(client, "tiny-encoder"), plain, atol=2e-6, rtol=0)
    for name in KINDS:
        wanted = stock_vectors(folder, adapted(folder, folders[name]))
        torch.testing.assert_close(embedded(client, name), wanted, atol=2e-6, rtol=0)
        assert (wanted - plain).abs().max() > 0.02
    whole = {name: adapted(folder, folders[name]).merge_and_unload().state_dict() for name in KINDS}
    model = AutoModel.from_pretrained(folder)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    blend = {"plain": 0.4, "turned": 0.6}
    model.load_state_dict({
        name: value + sum(strength * (whole[adapter][name] - value) for adapter, strength in blend.items())
        for name, value in base.items()
    })  # fmt: skip
    wanted = stock_vectors(folder, model)
    torch.testing.assert_close(embedded(client, "plain:0.4+turned:0.6"), wanted, atol=1e-5, rtol=0)


def test_many_clients_at_once_each_get_their_own(server, client):
    names = ["tiny-encoder", *KINDS, "plain@1:0.5", "plain:0.3+steady:0.3"]
    alone = {name: embedded(client, name) for name in names}
    before = figures(server[0])

    async def crowd(count):
        async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as many:
            asked = [names[number % len(names)] for number in range(count)]
            replies = await asyncio.gather(*(many.embeddings.create(model=n, input=list(TEXTS)) for n in asked))
            return list(zip(asked, replies, strict=True))

    for name, reply in asyncio.run(crowd(60)):
        found = torch.tensor([item.embedding for item in reply.data])
        torch.testing.assert_close(found, alone[name], atol=2e-6, rtol=0)
        assert reply.usage.prompt_tokens == sum(len(text.split()) + 2 for text in TEXTS)
    after = figures(server[0])
    assert (
        after['haori:adapter_requests_total{adapter="plain"}'] - before['haori:adapter_requests_total{adapter="plain"}']
        == 30
    )
    assert after['vllm:num_requests_running{model_name="tiny-encoder"}'] == 0


def test_a_client_that_leaves_takes_its_texts_along(server):
    url, _ = server
    texts = [" ".join(["cat"] * 37)] * 64
    body = json.dumps({"model": "turned", "input": texts}).encode()
    fields = ("POST /v1/embeddings HTTP/1.1", "Host: localhost", "Content-Type: application/json",
              f"Content-Length: {len(body)}")  # fmt: skip
    head = "".join(f"{field}\r\n" for field in fields) + "\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(0.01)
    end = time.monotonic() + 10
    while figures(url)['vllm:num_requests_running{model_name="tiny-encoder"}']:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert httpx.post(f"{url}/v1/embeddings", json={"model": "plain", "input": "cat"}).status_code == 200


def test_what_is_not_served_is_refused_by_name(client):
    message = [{"role": "user", "content": "hello"}]
    for ask in (
        lambda: client.chat.completions.create(model="plain", messages=message),
        lambda: client.completions.create(model="tiny-encoder", prompt="hello"),
    ):
        with pytest.raises(openai.BadRequestError, match="is an encoder and writes no text") as caught:
            ask()
        assert caught.value.code == "text_not_served"
    with pytest.raises(openai.BadRequestError, match=r"Text 2 has 52 tokens.*at most 40"):
        client.embeddings.create(model="plain", input=["cat", "cat " * 50])
    with pytest.raises(openai.NotFoundError, match="plian"):
        client.embeddings.create(model="plian", input="cat")
    with pytest.raises(openai.BadRequestError, match="'dimensions' is not supported"):
        client.embeddings.create(model="plain", input="cat", dimensions=8)


def test_an_adapter_that_comes_later_is_served(client, place, tmp_path, monkeypatch):
    home, folder, _ = place
    monkeypatch.setenv("HAORI_HOME", str(home))
    late = stock_encoder(folder, tmp_path / "late", seed=9)
    import_adapter(late, find_base(str(folder)), name="late", library=Library(home / "library"))
    torch.testing.assert_close(
        embedded(client, "late"), stock_vectors(folder, adapted(folder, late)), atol=2e-6, rtol=0
    )


def test_the_end_is_orderly(place, tmp_path, monkeypatch):
    home, folder, _ = place
    monkeypatch.setenv("HAORI_HOME", str(home))
    with serving(tmp_path / "log", "--base", folder, "--max-prompt-tokens", 10) as (process, url, _):
        reply = httpx.post(f"{url}/v1/embeddings", json={"model": "plain", "input": "cat " * 9})
        assert "at most 10" in reply.json()["error"]["message"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
