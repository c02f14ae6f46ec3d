"""Clients that read slowly or not at all: what waits for them has a bound, and they lose nothing of their answers."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from haori.serve.request import StreamChunk, TokenLogprob
from haori.server import answers, flow, listen
from haori.server.answer_streams import ChoiceChunk, ChunkQueue
from tests import server_samples
from tests.server_samples import RepeatingEngine, served, until

HELLO = [{"role": "user", "content": "hello there, how are you today?"}]
ASKED = {"model": "support", "messages": HELLO, "logprobs": True, "top_logprobs": 20, "stream": True}


def send(url, **changes):
    """Ask from a client with a small buffer, which reads nothing yet."""
    body = json.dumps({**ASKED, **changes}).encode()
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json",
             "Connection: close", f"Content-Length: {len(body)}", "", "")  # fmt: skip
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", httpx.URL(url).port))
    connection.sendall("\r\n".join(lines).encode() + body)
    return connection


def read(connection, pause_s=0.0):
    """Read an answer to its end; return text, tokens with log-probabilities, and how it ended."""
    raw = b""
    while part := connection.recv(1 << 16):
        raw += part
        time.sleep(pause_s)
    connection.close()
    events = re.findall(rb"data: (\{.*?\})\n\n", b"".join(chunks(raw)))
    found = [json.loads(event) for event in events]
    choices = [event["choices"][0] for event in found if "choices" in event]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    logprobs = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    return text, logprobs, choices[-1]["finish_reason"], [event["error"] for event in found if "error" in event]


def chunks(raw):
    """Take HTTP's chunks apart."""
    rest = raw.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        yield rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Have the system take little between server and client: up to 4 MB for each connection else."""

    def listens(*address):
        taken = listen(*address)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        return taken

    monkeypatch.setattr(server_samples, "listen", listens)


@pytest.fixture
def queues(monkeypatch):
    made = []

    class Noted(ChunkQueue):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(answers, "ChunkQueue", Noted)
    return made


def test_slow_readers_hold_their_answers_up_and_lose_nothing(tiny_tokenizer, tmp_path, queues):
    with served(RepeatingEngine(tiny_tokenizer, step_s=0.0005), home=tmp_path) as server:
        whole = read(send(server.url, max_tokens=1500))
        assert (len(whole[1]), whole[2:]) == (1500, ("length", []))
        slow = [send(server.url, max_tokens=1500) for _ in range(4)]
        until(lambda: sum(job.paused for job in list(server.engine._jobs.values())) == 4, 60)
        assert max(queue.tokens for queue in queues) < 2 * flow._WAITING
        assert read(send(server.url, max_tokens=50))[2] == "length"  # who reads is answered meanwhile
        for connection in slow:
            assert read(connection) == whole
        assert server.until_idle()
        assert sum(queue.tokens for queue in queues) == 0


def test_what_cannot_be_paused_is_ended_when_far_too_much_waits(tiny_tokenizer, tmp_path):
    engine = RepeatingEngine(tiny_tokenizer)
    engine.pause = lambda _: None
    with served(engine, home=tmp_path) as server:
        connection = send(server.url, max_tokens=10**7)
        assert server.until_idle(60)
        _, logprobs, finish, errors = read(connection)
    assert (finish, len(errors)) == (None, 1)
    assert "wait to be read" in errors[0]["message"]
    assert 0 < len(logprobs) < 100_000  # what the system had taken


def test_who_reads_nothing_for_long_is_given_up(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(flow, "_FAR_TOO_MUCH", 1000)
    monkeypatch.setattr(flow, "_CHECK_EVERY_S", 0.1)
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path) as server:
        connection = send(server.url, max_tokens=3000)
        time.sleep(3)  # a paused request is none of the engine's, so its being idle says nothing
        assert "Nothing of the answer was read" in read(connection)[3][0]["message"]


def test_pieces_that_wait_become_one_and_say_the_same():
    async def play():
        queue, told = ChunkQueue(), []
        for number in range(1000):
            top = tuple((i, -float(i * number)) for i in range(20))
            chunk = StreamChunk(f"{number} ", (number,), (TokenLogprob(number, -1.0 / 3, top),))
            queue.put(ChoiceChunk(number % 2, chunk))
        queue.put(ChoiceChunk(0, StreamChunk("end", finish="stop", cached_tokens=3)))
        queue.put(ChoiceChunk(1, StreamChunk(finish="error", error="no")))
        assert queue.tokens == 1000
        while len([piece for piece in told if piece.chunk.finish]) < 2:
            told.append(await queue.get())
        assert queue.tokens == 0
        return told

    told = asyncio.run(play())
    assert len(told) < 60
    assert max(len(piece.chunk.tokens) for piece in told) <= 64
    for choice in (0, 1):
        own = [piece.chunk for piece in told if piece.choice == choice]
        assert "".join(chunk.text for chunk in own[:-1]) == "".join(f"{n} " for n in range(choice, 1000, 2))
        assert [token for chunk in own for token in chunk.tokens] == list(range(choice, 1000, 2))
        logprobs = [found for chunk in own for found in chunk.logprobs]
        assert [found.token for found in logprobs] == list(range(choice, 1000, 2))
        assert all(found.top == tuple((i, -float(i * found.token)) for i in range(20)) for found in logprobs)
    assert [piece.chunk.finish for piece in told if piece.chunk.finish] == ["stop", "error"]


SERVER = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from tests.server_samples import RepeatingEngine, served
engine = RepeatingEngine(AutoTokenizer.from_pretrained(sys.argv[1]), step_s=0.0005)
with served(engine, home=Path(sys.argv[2])) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


def resident_mb(process):
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(found[1]) / 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_slow_readers_take_little_memory(tiny_base_folder, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tiny_base_folder), str(tmp_path)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        read(send(url, max_tokens=2000))
        before, most = resident_mb(process), 0.0
        slow = [send(url, max_tokens=6000) for _ in range(20)]
        quiet = 0
        while quiet < 10:  # until nothing grows any more
            time.sleep(0.2)
            now = resident_mb(process)
            quiet, most = (quiet + 1 if now < most + 0.5 else 0), max(most, now)
        assert most - before < 60  # 120,000 tokens with log-probabilities of 20 each
        for connection in slow:
            connection.close()
        until(lambda: resident_mb(process) - before < 60)
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        process.wait(30)
