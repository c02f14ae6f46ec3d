"""`haori serve` as a user runs it: a process with the real engine, its own adapters, signals, and a kill."""

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import ExitStack
from typing import get_args

import httpx
import openai
import pytest

from haori.bases import find_base
from haori.cli import serve_native
from haori.library import import_adapter, open_adapter
from haori.serve.models.weight import WeightFormat
from haori.server import KeyStore
from tests.command_line import haori
from tests.serving_process import said, serving, strong_lora

PROMPTS = ["Is this review positive?", "user answer", "the system"]


@pytest.fixture(scope="module")
def library(tiny_base_folder, tmp_path_factory):
    """A home with three adapters of one base, and what each answers alone."""
    from haori.core.settings import settings

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(home))
        settings.cache_clear()
        base = find_base(str(tiny_base_folder))
        answers = {}
        for i in range(3):
            folder = strong_lora(tiny_base_folder, tmp_path_factory.mktemp(f"a{i}"), i)
            import_adapter(folder, base, name=f"a{i}")
            opened = open_adapter(f"a{i}", base_spec=str(tiny_base_folder), dtype="fp32")
            for prompt in PROMPTS:
                asked = [{"role": "user", "content": prompt}]
                answers[f"a{i}", prompt] = opened.answer(asked, max_new_tokens=12)
                with opened.strength(False):
                    answers[base.name, prompt] = opened.answer(asked, max_new_tokens=12)
        yield home, base, answers
    settings.cache_clear()


@pytest.fixture
def home(library, monkeypatch):
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_HOME", str(library[0]))
    settings.cache_clear()
    return library[0]


def answer(client, model, prompt):
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=12, temperature=0
    )
    return reply.choices[0].message.content


def test_adapters_answer_side_by_side_as_they_do_alone_and_the_end_is_orderly(library, home, tiny_base_folder):
    _, base, answers = library
    assert len(set(answers.values())) > len(PROMPTS)  # the adapters do say different things
    with ExitStack() as stack:
        options = ("--base", tiny_base_folder, "--weights", "fp32", "--max-batch", "16")
        process, url, _ = stack.enter_context(serving(*options))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)
        stack.enter_context(client)
        listed = [model.id for model in client.models.list()]
        assert listed == [base.name, "a0", "a0@1", "a1", "a1@1", "a2", "a2@1"]
        found = {}
        threads = [
            threading.Thread(target=lambda key=key: found.update({key: answer(client, *key)})) for key in answers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == answers
        assert answer(client, "a0:0.5+a1:0", PROMPTS[0]) == answer(client, "a0:0.5", PROMPTS[0])
        with pytest.raises(openai.NotFoundError, match="did you mean 'a0'"):
            answer(client, "a00", "x")
        with pytest.raises(openai.BadRequestError, match="no model name"):
            answer(client, "a0 + a1", "x")
        figures = httpx.get(f"{url}/metrics").text
        assert 'haori:adapter_requests_total{adapter="a0"} 5.0' in figures
        long = {"model": "a1", "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(30) == 0
        log = [json.loads(line) for line in said(process).splitlines()]
        assert log[-1].get("generated_tokens") == 200 or log[-2].get("generated_tokens") == 200
        assert not [line for line in log if "error" in line]


def test_loaded_adapters_are_there_again_after_a_kill_and_a_second_signal_ends_at_once(
    library, home, tiny_base_folder, tmp_path
):
    folder = strong_lora(tiny_base_folder, tmp_path / "roots" / "mine", 9)
    options = ("--base", tiny_base_folder, "--adapter-root", tmp_path / "roots", "--log-format", "text")
    with serving(*options) as (process, url, _):
        reply = httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": str(folder)})
        assert reply.status_code == 200, reply.text
        outside = {"lora_name": "x", "lora_path": str(tmp_path / "roots" / ".." / "..")}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=outside).status_code == 404
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    secret = KeyStore().create("printed").secret
    key = {"authorization": f"Bearer {secret}"}
    with serving(*options) as (process, url, command):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        done = subprocess.run(
            ["sh", "-c", f"{command} -s"], env={**os.environ, "HAORI_KEY": secret}, capture_output=True
        )
        assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"
        assert "mine" in [model["id"] for model in httpx.get(f"{url}/v1/models", headers=key).json()["data"]]
        busy = {"model": "mine", "prompt": "a", "max_tokens": 240, "ignore_eos": True, "n": 8, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=busy, headers=key, timeout=60) as reply:
            assert next(reply.iter_lines())
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 128 + signal.SIGINT
    KeyStore().revoke("printed")


def test_a_pinned_adapter_stays_in_memory_and_one_that_nothing_can_be_done_with_is_the_callers_fault(
    library, home, tiny_base_folder
):
    options = ("--base", tiny_base_folder, "--weights", "fp32", "--pin", "a1")
    size = next((home / "library").rglob("adapter_model.safetensors")).stat().st_size
    with serving(*options, "--adapter-memory", f"{3 * size // 2}B") as (_, url, _), httpx.Client(base_url=url) as http:
        ask = {"prompt": "a", "max_tokens": 2}
        assert http.post("/v1/completions", json={"model": "a1", **ask}).status_code == 200
        reply = http.post("/v1/completions", json={"model": "a0", **ask}, timeout=30)
        assert reply.status_code == 400
        assert "those pinned" in reply.json()["error"]["message"]
        assert http.post("/v1/completions", json={"model": "a1", **ask}).status_code == 200


def test_the_command_knows_the_formats_that_the_engine_knows():
    assert set(serve_native._FORMATS) == {"auto", *get_args(WeightFormat)}


def test_what_cannot_be_served_is_a_sentence(capsys, haori_home, tiny_base_folder, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = haori(capsys, "serve", "--base", tiny_base_folder, "--port", port)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "choose another --port" in done.err
    for arguments, words in (
        (["--host", "0.0.0.0"], "keys create"),
        (["--adapter-root", tmp_path / "missing"], "no folder"),
        (["--kv-memory", "lots"], "amount of memory"),
        (["--log-format", "xml"], "json and text"),
        (["--base", tmp_path / "missing"], "missing"),
        (["--weights", "int3"], "int4"),
        (["--pin", "nobody"], "nobody"),
        (["--pin", tiny_base_folder.name], "without an adapter"),
        (["--pin", "a0", "--engine", "vllm"], "--pin is for the native engine"),
        (["--weights", "int8", "--engine", "vllm"], "--weights is for the native engine"),
        (["--kv-memory", "2GB", "--engine", "vllm"], "--kv-memory is for the native engine"),
    ):
        done = haori(capsys, "serve", "--base", tiny_base_folder, "--port", 0, *arguments)
        assert done.code == 2, arguments
        assert words in done.err
        assert "Traceback" not in done.err
