"""Loading, disconnects, many connections at once, metrics and logs, and an orderly end."""

import asyncio
import json
import socket
import threading

import httpx
import pytest

from haori.core.errors import BaseError, HaoriError, InputError
from haori.server import AccessLog, Backend, ServerSettings, Service, create_app, listen
from haori.server.access import Access
from haori.server.keys import KeyStore
from haori.server.launch import RunningServer
from tests.server_samples import RepeatingEngine, SmallDirectory, sample_base, served, until

HELLO = [{"role": "user", "content": "hello"}]
LONG = {"model": "support", "messages": HELLO, "max_tokens": 5000}


def figures(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_a_server_that_loads_says_so(tiny_tokenizer, tmp_path):
    engine = RepeatingEngine(tiny_tokenizer)
    with served(engine, home=tmp_path, loaded=False) as server:
        for path in ("/health", "/v1/models"):
            reply = httpx.get(server.url + path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "loading")
            assert reply.headers["retry-after"] == "1"
        assert httpx.get(f"{server.url}/version").status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        server.service.attach(Backend(engine, SmallDirectory()))
        assert httpx.get(f"{server.url}/health").json() == {"status": "ready"}


def test_an_engine_that_cannot_go_on_is_not_healthy(tiny_tokenizer, tmp_path):
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.engine.failure = "The engine has ended (RuntimeError: no device); start the server again."
        reply = httpx.get(f"{server.url}/health")
        assert (reply.status_code, reply.json()["error"]["message"]) == (503, server.engine.failure)
        server.engine.failure = None
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_base_that_cannot_be_loaded_ends_the_server_with_its_sentence(tmp_path, capsys):
    service = Service(sample_base(), ServerSettings(), AccessLog("text"))
    server = RunningServer(create_app(service, Access(KeyStore(tmp_path / "k.json"), "127.0.0.1")), service)

    def make():
        raise BaseError("The weights are damaged.")

    service.load(make, on_failure=server.stop)
    with pytest.raises(HaoriError, match="weights are damaged"):
        server.serve_on(listen("127.0.0.1", 0))
    assert "The weights are damaged." in capsys.readouterr().err


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request_at_once(tiny_tokenizer, tmp_path, stream):
    with served(RepeatingEngine(tiny_tokenizer, step_s=0.005), home=tmp_path) as server:
        body = json.dumps({**LONG, "stream": stream, "n": 3}).encode()
        lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
        address = ("127.0.0.1", httpx.URL(server.url).port)
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode() + body)
            until(lambda: server.engine.status().running == 3)
            if stream:
                assert b"200 OK" in connection.recv(100)
        until(lambda: server.engine.status().running == 0)
        until(lambda: '"finish": "cancelled"' in server.log.getvalue())
        assert figures(server)['vllm:request_success_total{finished_reason="abort",model_name="tiny"}'] == 3


def test_figures_of_what_was_done(tiny_tokenizer, tmp_path):
    with served(RepeatingEngine(tiny_tokenizer, step_s=0.002), home=tmp_path) as server:
        for model in ("support@2", "support:0.3+other-one:0.7", "tiny"):
            reply = httpx.post(f"{server.url}/v1/completions", json={"model": model, "prompt": "abc", "max_tokens": 4})
            assert reply.status_code == 200
        found = figures(server)
        tiny = 'model_name="tiny"'
        assert found[f"vllm:prompt_tokens_total{{{tiny}}}"] == 9
        assert found[f"vllm:generation_tokens_total{{{tiny}}}"] == 12
        assert found[f'vllm:request_success_total{{finished_reason="length",{tiny}}}'] == 3
        assert found[f"vllm:time_to_first_token_seconds_count{{{tiny}}}"] == 3
        assert found[f"vllm:inter_token_latency_seconds_count{{{tiny}}}"] == 9
        assert found[f"vllm:e2e_request_latency_seconds_count{{{tiny}}}"] == 3
        assert found[f"vllm:num_requests_running{{{tiny}}}"] == 0
        assert found[f"vllm:kv_cache_usage_perc{{{tiny}}}"] == 0
        assert (
            found[f"vllm:prefix_cache_queries_total{{{tiny}}}"],
            found[f"vllm:prefix_cache_hits_total{{{tiny}}}"],
        ) == (7, 3)
        assert found['haori:adapter_requests_total{adapter="support"}'] == 2
        assert found['haori:adapter_requests_total{adapter="other-one"}'] == 1
        assert found['haori:adapter_tokens_total{adapter="tiny"}'] == 4
        assert found["haori:adapter_loads_total"] == 5
        assert not [name for name in found if "_created" in name]


def test_adapters_at_work_are_named(tiny_tokenizer, tmp_path):
    with served(RepeatingEngine(tiny_tokenizer, step_s=0.005), home=tmp_path) as server:
        asked = {**LONG, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked) as reply:
            assert reply.status_code == 200
            until(lambda: server.engine.status().running == 1)
            [info] = [name for name in figures(server) if name.startswith("vllm:lora_requests_info")]
            assert 'running_lora_adapters="support"' in info
            assert 'max_lora="32"' in info
            assert 'waiting_lora_adapters=""' in info


def test_names_without_end_make_no_series_without_end(tiny_tokenizer, tmp_path):
    directory = SmallDirectory(names=[f"a{i}" for i in range(12)])
    settings = ServerSettings(metered_adapters=5)
    with served(RepeatingEngine(tiny_tokenizer), directory, home=tmp_path, settings=settings) as server:
        with httpx.Client(base_url=server.url) as client:

            def ask(model):
                return client.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 1}).status_code

            before = len(figures(server))
            assert {ask(f"unknown-{i}") for i in range(100)} == {404}
            assert len(figures(server)) == before
            assert {ask(f"a{i % 12}:0.{i + 1}") for i in range(60)} == {200}
        found = figures(server)
        series = [name for name in found if name.startswith("haori:adapter_requests_total")]
        assert len(series) == 6
        assert found['haori:adapter_requests_total{adapter="other"}'] == 35
        lines = server.log.getvalue().splitlines()
        assert len(json.loads(lines[0])["model"]) < 200


def test_the_log_says_what_was_done_and_not_what_was_said(tiny_tokenizer, tmp_path):
    with served(RepeatingEngine(tiny_tokenizer, step_s=0.002), home=tmp_path) as server:
        messages = [{"role": "user", "content": "a private matter"}]
        asked = {"model": "support@2:0.5", "messages": messages, "max_tokens": 4}
        httpx.post(f"{server.url}/v1/chat/completions?private=1", json=asked, headers={"x-request-id": "mine"})
        httpx.get(f"{server.url}/health")
        until(lambda: server.log.getvalue().count("\n") == 1)
    line = json.loads(server.log.getvalue().splitlines()[0])
    assert "private" not in server.log.getvalue()
    assert line["request_id"] == "mine"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["model"], line["adapters"], line["finish"]) == ("support@2:0.5", ["sha256:support@2"], "length")
    assert (line["generated_tokens"], line["cached_tokens"]) == (4, 2)
    assert 0 < line["ttft_ms"] < line["duration_ms"]


async def _crowd(url, count, tokens):
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=count)) as client:

        async def one(i):
            asked = {
                "model": ["tiny", "support", "support:0.5+other-one:0.5"][i % 3],
                "prompt": f"word {i} ",
                "stream": i % 2 == 0,
            }
            reply = await client.post(f"{url}/v1/completions", json={**asked, "max_tokens": tokens})
            if i % 2 == 0:
                assert reply.text.endswith("data: [DONE]\n\n")
                chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n")[:-2]]
                return i, "".join(chunk["choices"][0]["text"] for chunk in chunks)
            return i, reply.json()["choices"][0]["text"]

        return await asyncio.gather(*map(one, range(count)))


def test_a_thousand_connections_at_once_each_get_their_own_answer(tiny_tokenizer, tmp_path):
    with served(RepeatingEngine(tiny_tokenizer, step_s=0.001), home=tmp_path) as server:
        for i, text in asyncio.run(_crowd(server.url, 1000, 6)):
            prompt = tiny_tokenizer(f"word {i} ")["input_ids"]
            wanted = [prompt[j % len(prompt)] for j in range(6)]
            assert text == tiny_tokenizer.decode(wanted, skip_special_tokens=True)
        assert figures(server)['vllm:request_success_total{finished_reason="length",model_name="tiny"}'] == 1000


def test_the_end_waits_for_answers_and_refuses_new_requests(tiny_tokenizer, tmp_path):
    with served(RepeatingEngine(tiny_tokenizer, step_s=0.005), home=tmp_path) as server:
        asked = {"model": "support", "prompt": "abc", "max_tokens": 60}
        found = []
        thread = threading.Thread(
            target=lambda: found.append(httpx.post(f"{server.url}/v1/completions", json=asked, timeout=20))
        )
        thread.start()
        until(lambda: server.engine.status().running == 1)
        server.server.end()
        until(lambda: server.service.state == "draining")
        reply = httpx.post(f"{server.url}/v1/completions", json=asked)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        assert int(reply.headers["retry-after"]) >= 1
        assert httpx.get(f"{server.url}/health").status_code == 503
        thread.join(20)
        assert found[0].json()["usage"]["completion_tokens"] == 60
        until(lambda: server.server.should_exit)


def test_the_end_does_not_wait_for_ever(tiny_tokenizer, tmp_path):
    settings = ServerSettings(drain_s=0.1)
    with served(RepeatingEngine(tiny_tokenizer, step_s=0.005), home=tmp_path, settings=settings) as server:
        with httpx.stream(
            "POST",
            f"{server.url}/v1/completions",
            json={"model": "tiny", "prompt": "abc", "max_tokens": 5000, "stream": True},
        ) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            server.server.end()
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        assert "did not end in time" in server.log.getvalue()


def test_a_port_in_use_is_a_sentence():
    with listen("127.0.0.1", 0) as taken, pytest.raises(InputError, match="choose another --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="no host"):
        listen("no such host", 1)
