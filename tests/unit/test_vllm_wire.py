"""What is said to vLLM and how its answers are read: requests, chunks, text, names and turns, without any server."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from haori.core.errors import HaoriError, InputError, MissingExtraError, UnavailableError
from haori.serve.request import Sampling, TextRequest, TokenLogprob
from haori.serve.vllm.answer import VllmAnswer
from haori.serve.vllm.conversion import allowed_rank, vllm_name
from haori.serve.vllm.process import VllmProcess
from haori.serve.vllm.registry import LoadedAdapters
from haori.serve.vllm.routing import Server, choose_server
from haori.serve.vllm.servers import VllmServers
from haori.serve.vllm.upstream import ServedModel, Upstream
from haori.serve.vllm.wire import VllmChunk, completion_body, read_chunk
from tests.server_samples import sample_base, until


def event(**fields):
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": None, "token_ids": [5], **fields}
    return {"id": "cmpl-1", "choices": [choice]}


def test_an_answer_never_passes_the_context():
    request = TextRequest("r", (1, 2, 3), sampling=Sampling(max_tokens=50))
    body = completion_body(request, "m", room=20, stop_tokens=frozenset({9, 4}))
    assert (body["prompt"], body["max_tokens"], body["stop_token_ids"]) == ([1, 2, 3], 20, [4, 9])
    unlimited = completion_body(TextRequest("r", (1,)), "m", room=20, stop_tokens=frozenset())
    assert unlimited["max_tokens"] == 20
    assert not {"seed", "logprobs", "structured_outputs", "logit_bias"} & unlimited.keys()


def test_a_schema_or_a_grammar_goes_along():
    for sampling, wanted in (
        (Sampling(json_schema={"type": "null"}), {"json": {"type": "null"}}),
        (Sampling(json_schema={}), {"json_object": True}),
        (Sampling(grammar='start: "a"'), {"grammar": 'start: "a"'}),
    ):
        body = completion_body(TextRequest("r", (1,), sampling=sampling), "m", room=20, stop_tokens=frozenset())
        assert body["structured_outputs"] == wanted


def test_of_the_named_tokens_the_likeliest_are_taken_and_the_chosen_one_is_not_counted_among_them():
    logprobs = {
        "tokens": ["token_id:5"], "token_logprobs": [-7.5], "text_offset": [0],
        "top_logprobs": [{"token_id:5": -7.5, "token_id:8": -0.5, "token_id:3": -0.5, "token_id:1": -2.0}],
    }  # fmt: skip
    chunk = read_chunk(event(logprobs=logprobs), tops=3)
    assert chunk.logprobs == (TokenLogprob(5, -7.5, ((3, -0.5), (8, -0.5), (1, -2.0))),)
    assert read_chunk(event(logprobs=logprobs), tops=0).logprobs == (TokenLogprob(5, -7.5, ()),)
    assert read_chunk(event(logprobs=logprobs), tops=None).logprobs == ()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"choices": 3},
        {"choices": [{}]},
        event(token_ids=["x"]),
        {"choices": [{"text": "a", "finish_reason": None}]},
    ],
)
def test_what_vllm_does_not_send_is_an_error_with_a_sentence(given):
    with pytest.raises(HaoriError, match=r"use vLLM 0\.32"):
        read_chunk(given, tops=None)
    with pytest.raises(HaoriError, match="cannot be read"):
        read_chunk(event(), tops=2)  # log-probabilities were asked for


def test_figures_and_errors_are_told_apart():
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 7}}
    assert read_chunk({"choices": [], "usage": usage}, tops=None) == VllmChunk(cached_tokens=7)
    assert read_chunk({"choices": [], "usage": {"prompt_tokens": 9}}, tops=None) == VllmChunk(cached_tokens=0)
    assert read_chunk({"error": {"message": "no", "code": 500}}, tops=None) == VllmChunk(error="no")
    assert read_chunk({"error": {"message": "no", "code": 400}}, tops=None).error_status == 400


def answer_of(tokenizer, **sampling):
    said = []
    stops = frozenset({tokenizer.eos_token_id})
    return VllmAnswer(TextRequest("r", (1,), sampling=Sampling(**sampling)), said.append, tokenizer, stops), said


def test_text_waits_for_whole_characters_and_the_last_piece_for_the_figures(tiny_tokenizer):
    tokens = tiny_tokenizer("né?")["input_ids"]
    answer, said = answer_of(tiny_tokenizer)
    for token in tokens:
        answer.take(VllmChunk((token,)))
    answer.take(VllmChunk((tiny_tokenizer.eos_token_id,), finish="stop"))
    assert "".join(chunk.text for chunk in said) == "né?"
    assert not answer.complete
    answer.take(VllmChunk(cached_tokens=4))
    answer.end()
    assert (said[-1].finish, said[-1].cached_tokens, said[-1].tokens) == ("stop", 4, (tiny_tokenizer.eos_token_id,))
    assert [token for chunk in said for token in chunk.tokens] == [*tokens, tiny_tokenizer.eos_token_id]
    assert all(chunk.text for chunk in said[:-1])  # bytes of a character are no piece of their own


def test_a_stop_string_ends_the_answer_inside_a_chunk(tiny_tokenizer):
    tokens = tiny_tokenizer("abcdef")["input_ids"]
    answer, said = answer_of(tiny_tokenizer, stop=("cd",), logprobs=0)
    answer.take(VllmChunk(tuple(tokens), tuple(TokenLogprob(token, -1.0) for token in tokens)))
    assert answer.stopped
    answer.end()
    assert "".join(chunk.text for chunk in said) == "ab"
    assert said[-1].finish == "stop"
    assert len(said[-1].tokens) == len(said[-1].logprobs) < len(tokens)


def test_an_answer_without_an_end_is_an_outage(tiny_tokenizer):
    answer, said = answer_of(tiny_tokenizer)
    answer.take(VllmChunk(tuple(tiny_tokenizer("a")["input_ids"])))
    with pytest.raises(UnavailableError, match="before the answer was complete"):
        answer.end()
    with pytest.raises(UnavailableError, match="gave the answer up"):
        answer.take(VllmChunk(finish="abort"))
    answer.fail("error", "gone", "outage")
    answer.fail("cancelled")
    assert [(chunk.finish, chunk.fault) for chunk in said[1:]] == [("error", "outage")]


def test_names_are_by_content_and_long_enough_not_to_be_hit_on_purpose():
    one, other = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    names = [vllm_name(mix) for mix in (((one, 1.0),), ((one, 0.5),), ((one, 1.0), (other, 1.0)), ((other, 1.0),))]
    assert len(set(names)) == 4
    assert all(name.startswith("haori-") and len(name) == 38 for name in names)
    assert [allowed_rank(rank) for rank in (1, 8, 9, 33, 256, 999)] == [8, 8, 16, 64, 256, 256]


class Recording(Upstream):
    """An address where nobody listens, and what would have been asked there."""

    def __init__(self, number=0):
        self.url = f"http://127.0.0.1:{number}"
        self.asked = []
        self.failing = False

    async def load(self, name, folder):
        await asyncio.sleep(0)
        self.asked.append(f"+{name}")
        if self.failing:
            raise InputError("no")

    async def unload(self, name):
        self.asked.append(f"-{name}")


def server(number):
    upstream = Recording(number)
    return Server(upstream, ServedModel("m", "/m", 100), LoadedAdapters(upstream, 4))


def test_adapters_stay_with_their_server_and_only_those_of_a_lost_one_move():
    servers = [server(number) for number in range(3)]
    names = [f"haori-{number}" for number in range(60)]
    before = {name: choose_server(servers, name, 9) for name in names}
    assert {*before.values()} == {*servers}
    servers[0].alive = False
    after = {name: choose_server(servers, name, 9) for name in names}
    assert all(after[name] is before[name] for name in names if before[name] is not servers[0])
    assert {after[name] for name in names if before[name] is servers[0]} == {*servers[1:]}


def test_the_base_goes_where_least_is_going_on_and_a_full_server_gets_nothing():
    servers = [server(number) for number in range(2)]
    servers[0].running = {"a"}
    assert choose_server(servers, None, 2) is servers[1]
    servers[1].running = {"b", "c"}
    assert choose_server(servers, None, 2) is servers[0]
    assert choose_server(servers, "haori-1", 2) is servers[0]
    servers[0].running.add("d")
    assert choose_server(servers, "haori-1", 2) is choose_server(servers, None, 2) is None
    for one in servers:
        one.alive = False
    with pytest.raises(UnavailableError, match="No vLLM server can be reached"):
        choose_server(servers, None, 2)


async def found():
    return Path("/a")


def test_an_adapter_in_use_is_not_unloaded_and_a_failed_load_leaves_nothing():
    async def play():
        upstream = Recording()
        adapters = LoadedAdapters(upstream, 2)

        async def use(name):
            async with adapters.use(name, found):
                pass

        async with adapters.use("a", found):
            await asyncio.gather(use("b"), use("b"))
            await use("c")
            assert adapters.names == ("a", "c")
            await use("d")
            assert adapters.names == ("a", "d")
        await use("e")
        upstream.failing = True
        with pytest.raises(InputError):
            await use("f")
        assert "f" not in adapters.names
        adapters.forget_all()
        return upstream.asked, adapters.loads, adapters.evictions

    asked, loads, evictions = asyncio.run(play())
    assert asked[:7] == ["+a", "+b", "-b", "+c", "-c", "+d", "-a"]
    assert (loads, evictions) == (5, 4)


def test_one_who_leaves_does_not_end_the_load_of_another():
    async def play():
        adapters = LoadedAdapters(Recording(), 2)
        ready = asyncio.Event()

        async def slow():
            await ready.wait()
            return Path("/a")

        async def use():
            async with adapters.use("a", slow):
                return "there"

        first, second = asyncio.create_task(use()), asyncio.create_task(use())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        ready.set()
        return await second, adapters.loads

    assert asyncio.run(play()) == ("there", 1)


def is_gone(number):
    try:
        return (
            Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        )  # nobody asked how it ended
    except FileNotFoundError:
        return True


def program(folder, body):
    folder.mkdir()
    path = folder / "vllm"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return folder


def test_a_started_server_ends_with_all_that_it_started(tmp_path, monkeypatch):
    body = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN if 'stubborn' in sys.argv else signal.SIG_DFL)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print(os.environ['VLLM_API_KEY'], os.environ['VLLM_ALLOW_RUNTIME_LORA_UPDATING'], child.pid, *sys.argv[1:])\n"
        "sys.stdout.flush()\ntime.sleep(60)\n"
    )
    monkeypatch.setenv("PATH", f"{program(tmp_path / 'bin', body)}:{os.environ['PATH']}")
    log = tmp_path / "logs" / "vllm.log"
    options = {"--max-loras": "4", "--max-lora-rank": "16", "--enable-prompt-tokens-details": ""}
    process = VllmProcess(sample_base(), log, options=options, extra=["--max_lora-rank=64"])
    until(lambda: log.read_text().endswith("\n"))
    key, allowed, child, *arguments = log.read_text().split()
    assert (key, allowed) == (process.key, "True")
    assert arguments[:4] == ["serve", "/nowhere", "--host", "127.0.0.1"]
    assert arguments[-4:] == ["--max-loras", "4", "--enable-prompt-tokens-details", "--max_lora-rank=64"]
    assert key not in arguments
    assert process.running
    process.close()
    assert not process.running
    until(lambda: is_gone(int(child)))


def test_a_killed_parent_leaves_no_server_behind(tmp_path, monkeypatch):
    body = "import os, time\nopen(os.environ['MARK'], 'w').write(f'{os.getpid()}\\n')\ntime.sleep(60)\n"
    folder, mark = program(tmp_path / "bin", body), tmp_path / "mark"
    code = (
        "import time\nfrom pathlib import Path\nfrom types import SimpleNamespace\n"
        "from haori.serve.vllm.process import VllmProcess\n"
        f"log = Path({str(tmp_path / 'log')!r})\n"
        "p = VllmProcess(SimpleNamespace(path='/nowhere'), log, options={})\ntime.sleep(60)\n"
    )
    path = f"{folder}:{os.environ['PATH']}"
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PATH": path, "MARK": str(mark)})
    until(lambda: mark.exists() and mark.read_text().endswith("\n"), timeout_s=60)
    parent.kill()
    parent.wait()

    until(lambda: is_gone(int(mark.read_text())), timeout_s=20)


@pytest.mark.alone
def test_how_a_server_ended_is_said_with_its_last_error(tmp_path, monkeypatch):
    folder = program(tmp_path / "bin", "print('loading')\nraise RuntimeError('no GPU here')\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    process = VllmProcess(sample_base(), tmp_path / "log", options={})
    until(lambda: not process.running, timeout_s=20)
    assert "vLLM ended with status 1: RuntimeError: no GPU here (more is in" in str(process.ended())
    process.close()
    with pytest.raises(InputError, match="cannot set --port"):
        VllmProcess(sample_base(), tmp_path / "log", options={}, extra=["--port=80"])
    monkeypatch.setenv("PATH", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(MissingExtraError, match="pip install vllm"):
        VllmProcess(sample_base(), tmp_path / "log", options={})
    assert time.monotonic() - began < 1


SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        model = {"id": "tiny", "root": "/nowhere", "parent": None, "max_model_len": 256}
        body = json.dumps({"data": [model]}).encode() if self.path == "/v1/models" else b""
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer)
with open(os.environ["MARK"], "a") as mark:
    mark.write(f"{os.getpid()}\\n")
server.serve_forever()
"""


def test_a_started_server_that_ends_is_started_again_but_not_for_ever(tmp_path, monkeypatch):
    mark, says = tmp_path / "mark", []
    monkeypatch.setenv("PATH", f"{program(tmp_path / 'bin', SERVER)}:{os.environ['PATH']}")
    monkeypatch.setenv("MARK", str(mark))
    process = VllmProcess(sample_base(), tmp_path / "log", options={})

    def pids():
        return [int(line) for line in mark.read_text().splitlines()] if mark.exists() else []

    async def play():
        async def become(true):
            async with asyncio.timeout(30):
                while not true():
                    await asyncio.sleep(0.02)

        await become(pids)
        async with httpx.AsyncClient() as client:
            upstream = Upstream(process.url, client)
            server = Server(upstream, await upstream.served(), LoadedAdapters(upstream, 4), process)
            back = []
            servers = VllmServers([server], says.append)
            watching = asyncio.create_task(servers.watch(lambda: back.append(len(pids()))))
            for count in (1, 2, 3):
                os.kill(pids()[-1], signal.SIGKILL)
                await become(lambda: len(back) == count)  # noqa: B023 - used at once
                assert server.alive
            os.kill(pids()[-1], signal.SIGKILL)
            await become(lambda: len(says) == 7)
            assert not server.alive
            await asyncio.sleep(1.2)
            watching.cancel()
            return back

    try:
        assert asyncio.run(play()) == [2, 3, 4]
    finally:
        process.close()
    assert [("started again, which" in text, "is back" in text) for text in says[:6]] == [
        (True, False),
        (False, True),
    ] * 3
    assert "It was started again 3 times; start this server anew." in says[6]
    process.start_again()  # after its end was asked for it stays ended
    assert not process.running
    assert len(pids()) == 4


def test_no_owner_finds_prefixes_of_another_in_vllm_either():
    bodies = [
        completion_body(TextRequest("r", (1,), owner=owner), "m", room=20, stop_tokens=frozenset())
        for owner in ("", "one", "two")
    ]
    assert "cache_salt" not in bodies[0]
    assert bodies[1]["cache_salt"] != bodies[2]["cache_salt"]
