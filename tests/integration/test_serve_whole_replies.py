"""Whole replies with log-probabilities: the JSON that their models say, written as it is read; memory comes back."""

import asyncio
import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from haori.serve.request import TokenLogprob
from haori.server import server_memory
from haori.server.openai import whole_reply
from haori.server.openai.replies import ChatReply, CompletionReply
from haori.server.openai.response_replies import ResponseReply
from haori.server.openai.token_texts import TokenTexts
from tests import server_samples
from tests.server_samples import RepeatingEngine, served, until

TEXT = "hello there, how are you today?"
CHAT = {"model": "support", "messages": [{"role": "user", "content": TEXT}], "logprobs": True, "top_logprobs": 20}
PLAIN = {"model": "support", "prompt": [TEXT, "and you?"], "logprobs": 20}
RESPONSE = {"model": "support", "input": TEXT, "include": ["message.output_text.logprobs"], "top_logprobs": 20}


@pytest.fixture
def server(tiny_tokenizer, tmp_path):
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path) as running:
        yield running


def said(server, prompt, tokens, tops):
    """Return what the sample engine reports of its tokens."""
    top = [(other, -float(other)) for other in range(3, 3 + tops)]
    chosen = [prompt[i % len(prompt)] for i in range(tokens)]
    return [TokenLogprob(token, -0.5 if i else float("-inf"), top) for i, token in enumerate(chosen)]


def asked(server, path, body):
    reply = httpx.post(server.url + path, json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/json"
    return reply.text


@pytest.mark.parametrize("tops", [0, 1, 20])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_chats_are_written_as_their_model_says(server, tokens, tops):
    raw = asked(server, "/v1/chat/completions", {**CHAT, "max_tokens": tokens, "n": 2, "top_logprobs": tops})
    model = ChatReply.model_validate_json(raw)
    assert json.loads(raw) == model.model_dump()
    texts = TokenTexts(server.engine.tokenizer)
    [first, second] = server.engine.seen
    assert [choice.index for choice in model.choices] == [0, 1]
    assert first.prompt == second.prompt
    for choice in model.choices:
        assert choice.logprobs == texts.chat(said(server, first.prompt, tokens, tops))
    assert list(json.loads(raw)) == list(model.model_dump())  # in the same order


@pytest.mark.parametrize("tops", [0, 5])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_completions_are_written_as_their_model_says(server, tokens, tops):
    raw = asked(server, "/v1/completions", {**PLAIN, "max_tokens": tokens, "logprobs": tops})
    model = CompletionReply.model_validate_json(raw)
    assert json.loads(raw) == model.model_dump()
    texts = TokenTexts(server.engine.tokenizer)
    assert len(model.choices) == 2
    for choice, request in zip(model.choices, server.engine.seen, strict=True):
        assert choice.logprobs == texts.plain(said(server, request.prompt, tokens, tops), tops=tops, offset=0)


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_responses_are_written_as_their_model_says(server, tokens):
    raw = asked(server, "/v1/responses", {**RESPONSE, "max_output_tokens": tokens})
    model = ResponseReply.model_validate_json(raw)
    assert json.loads(raw) == model.model_dump()
    texts = TokenTexts(server.engine.tokenizer)
    [request] = server.engine.seen
    assert model.output[0].content[0].logprobs == texts.chat(said(server, request.prompt, tokens, 20)).content


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/chat/completions", {**CHAT, "logprobs": False, "top_logprobs": None}),
    ("/v1/completions", {**PLAIN, "logprobs": None}),
])  # fmt: skip
def test_without_log_probabilities_none_are_written(server, path, body):
    choices = json.loads(asked(server, path, body))["choices"]
    assert [choice["logprobs"] for choice in choices] == [None] * len(choices)


def send(url, body):
    """Ask from a client with a small buffer, which reads nothing yet."""
    content = json.dumps(body).encode()
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json",
             "Connection: close", f"Content-Length: {len(content)}", "", "")  # fmt: skip
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", httpx.URL(url).port))
    connection.sendall("\r\n".join(lines).encode() + content)
    return connection


def read(connection):
    """Read a reply to its end."""
    with connection, http.client.HTTPResponse(connection) as reply:
        reply.begin()
        return json.loads(reply.read())


def test_who_reads_nothing_for_long_is_given_up(tiny_tokenizer, tmp_path, monkeypatch):
    small_buffers(monkeypatch)
    monkeypatch.setattr(whole_reply, "_PATIENCE_S", 0.3)
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path) as server:
        connection = send(server.url, {**CHAT, "max_tokens": 3000})
        until(lambda: '"status":499' in server.log.getvalue().replace(" ", ""), 60)
        with pytest.raises((http.client.HTTPException, ValueError, OSError)):  # cut off in the middle
            read(connection)


def small_buffers(monkeypatch):
    """Have the system take little between server and client: up to 4 MB for each connection else."""

    def listens(*address):
        taken = listen(*address)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        return taken

    listen = server_samples.listen
    monkeypatch.setattr(server_samples, "listen", listens)


def test_memory_is_given_back_seldom_and_only_after_much_was_used(monkeypatch):
    given = []
    monkeypatch.setattr(server_memory, "release_free_memory", lambda: given.append(1))
    monkeypatch.setattr(server_memory, "_PAUSE_S", 0.2)

    async def play():
        memory = server_memory.ServerMemory()
        memory.used(server_memory._MUCH - 1)
        await asyncio.sleep(0.4)
        assert not given
        for _ in range(50):
            memory.used(server_memory._MUCH)
        await asyncio.sleep(0.5)
        assert len(given) == 1

    asyncio.run(play())


SERVER = """
import socket, sys
from pathlib import Path
from transformers import AutoTokenizer
from tests import server_samples
from tests.server_samples import RepeatingEngine, served

listen = server_samples.listen

def listens(*address):
    taken = listen(*address)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    return taken

server_samples.listen = listens
with served(RepeatingEngine(AutoTokenizer.from_pretrained(sys.argv[1])), home=Path(sys.argv[2])) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


def resident_mb(process):
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(found[1]) / 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_slow_readers_take_little_memory_and_it_comes_back(tiny_base_folder, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tiny_base_folder), str(tmp_path)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        read(send(url, {**CHAT, "max_tokens": 200}))
        before = resident_mb(process)
        slow = [send(url, {**CHAT, "max_tokens": 2000}) for _ in range(40)]
        for connection in slow:
            connection.settimeout(200)
            connection.recv(1, socket.MSG_PEEK)  # all is computed, and begins to come
        most = resident_mb(process)
        print(f"{before:.0f} MB before, {most:.0f} MB with 40 slow readers")
        assert most - before < 90  # 80,000 tokens with log-probabilities of 20 each: 160 MB of JSON
        whole = [read(connection) for connection in slow]
        assert all(len(reply["choices"][0]["logprobs"]["content"]) == 2000 for reply in whole)
        until(lambda: resident_mb(process) - before < 30, 60)
        print(f"{resident_mb(process):.0f} MB after")
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        process.wait(30)
