"""Two real replicas on this machine: the same answers, adapters that stay together, a replica killed under load."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from haori.bases import find_base
from haori.core.errors import InputError
from haori.core.settings import settings
from haori.library import Library, import_adapter
from haori.serve import AdapterDirectory, EngineLimits, Sampling, TextRequest, open_engine
from tests.integration.test_serve_command import strong_lora
from tests.server_samples import served, until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    # Ray 2.60 declares its settings as pydantic 2 no longer likes; nothing of ours is concerned.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

RUNNING = 2
ADAPTERS = [f"a{i}" for i in range(4)]
MODELS = [*ADAPTERS, "base", "a0:0.4+a1:0.6"]
PROMPTS = ["Is this review positive?", "user answer", "the system"]
TOKENS = 120


@pytest.fixture(scope="module")
def library(tiny_base_folder, tmp_path_factory):
    """A home with four adapters of one base, and a directory of them."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HAORI_HOME", str(home))
        settings.cache_clear()
        base = find_base(str(tiny_base_folder))
        for i, name in enumerate(ADAPTERS):
            import_adapter(strong_lora(tiny_base_folder, tmp_path_factory.mktemp(name), i), base, name=name)
        directory = AdapterDirectory(Library(), base.reference(), base_names=["base"])
        directory.entries()
        yield base, home, directory
    settings.cache_clear()


@pytest.fixture(scope="module")
def limits(library):
    return EngineLimits(library[0].context_length, running=RUNNING, waiting=64)


@pytest.fixture(scope="module")
def wanted(library, limits):
    """What the engine alone answers, greedily."""
    base, _, directory = library
    engine = open_engine(base, directory.files, limits, weights="fp32", cache_bytes=8 << 20)
    answers = {}
    for model in MODELS:
        for prompt in PROMPTS:
            pieces, done = [], threading.Event()

            def deliver(chunk, pieces=pieces, done=done):
                pieces.append(chunk)
                if chunk.finish:
                    done.set()

            ids = tuple(engine.tokenizer(prompt)["input_ids"])
            sampling = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
            engine.submit(TextRequest(f"{model} {prompt}", ids, directory.resolve(model).mix, sampling), deliver)
            assert done.wait(60)
            answers[model, prompt] = "".join(chunk.text for chunk in pieces)
    engine.close()
    assert len(set(answers.values())) == len(answers)
    return answers


@pytest.fixture(scope="module")
def engine(library, limits, wanted):
    from haori.serve.ray import ReplicaPlan, Scale, open_ray_engine

    base, home, _ = library
    said = []
    engine = open_ray_engine(
        ReplicaPlan(base, limits, "fp32", 8 << 20, (), home, None), Scale(2, 2), None, say=said.append
    )
    engine.said = said
    yield engine
    engine.close()
    assert not [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def server(engine, library, tmp_path_factory):
    with served(engine, library[2], home=tmp_path_factory.mktemp("keys")) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180) as client:
        yield client


def ask(client, model, prompt):
    """Return the streamed answer."""
    chunks = client.completions.create(
        model=model, prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    with chunks as stream:
        return "".join(chunk.choices[0].text for chunk in stream)


def replicas(engine):
    return {worker.pid: worker.engine for worker in engine.status().workers}


def settled(engine):
    """Wait until two replicas have said that nothing runs, and return what they say then."""

    def idle():
        found = replicas(engine)
        return len(found) == 2 and not any(status.running or status.waiting for status in found.values())

    time.sleep(2.5)  # what they say is of the last second
    until(idle, 180)
    return replicas(engine)


def test_answers_equal_the_engine_alone_and_adapters_stay_together(engine, client, wanted):
    assert len(replicas(engine)) == 2
    assert engine.said[-1] == "2 replicas answer requests."
    for model in ADAPTERS:
        assert ask(client, model, PROMPTS[0]) == wanted[model, PROMPTS[0]]
        time.sleep(0.5)  # Ray Serve has to hear where it went
    for prompt in PROMPTS:
        for model in ADAPTERS:
            assert ask(client, model, prompt) == wanted[model, prompt]
    found = settled(engine)
    print({pid: [name[:12] for name in status.resident_adapters] for pid, status in found.items()})
    loads = [status.adapter_loads for status in found.values()]
    assert sum(loads) <= len(ADAPTERS) + 1  # without affinity it would be about twice as many
    assert min(loads) >= 1  # and they do not all go to one replica
    for prompt in PROMPTS:
        for model in set(MODELS) - set(ADAPTERS):
            assert ask(client, model, prompt) == wanted[model, prompt]
    assert engine.status().prefix_queries > 0


def test_prompts_are_scored_by_a_replica(client):
    asked = {"model": "a0", "prompt": "hello you", "max_tokens": 0, "echo": True, "logprobs": 1}
    [choice] = client.completions.create(**asked).choices
    assert choice.text == "hello you"
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])


def test_a_replica_killed_under_load_costs_only_what_it_had_begun(engine, client, wanted):
    settled(engine)
    asked = [(model, prompt) for model in MODELS for prompt in PROMPTS]
    told, failed = {}, {}

    def one(key):
        try:
            told[key] = ask(client, *key)
        except openai.APIError as error:
            failed[key] = error

    threads = [threading.Thread(target=one, args=(key,)) for key in asked]
    for thread in threads:
        thread.start()
    until(lambda: engine.status().running == 2 * RUNNING, 60)
    victim = next(iter(replicas(engine)))
    assert any(child.pid == victim for child in psutil.Process().children(recursive=True))
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(180)
    assert not any(thread.is_alive() for thread in threads)
    print(f"{len(told)} answered, {len(failed)} failed: {[str(error) for error in failed.values()]}")
    assert len(told) + len(failed) == len(asked)
    assert all(text == wanted[key] for key, text in told.items())
    assert 1 <= len(failed) <= RUNNING
    assert all("ended before it was complete" in str(error) for error in failed.values())
    assert victim not in settled(engine)
    assert "1 replica answers requests." in engine.said
    again = {}
    threads = [threading.Thread(target=lambda key=key: again.update({key: ask(client, *key)})) for key in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert again == {key: wanted[key] for key in asked}


def test_a_request_that_is_not_wanted_any_more_is_freed_in_its_replica(engine, server):
    before = sum(status.generated_tokens for status in settled(engine).values())
    long = {"model": "a1", "prompt": "a", "max_tokens": 240, "ignore_eos": True, "n": 4, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=long, timeout=60) as reply:
        assert next(reply.iter_lines()).startswith("data: ")
    until(lambda: engine.drain(0), 20)
    after = sum(status.generated_tokens for status in settled(engine).values())
    assert 0 < after - before < 4 * 240
    endings = []
    for i in range(5):
        request = TextRequest(f"now-{i}", (5, 6, 7), sampling=Sampling(max_tokens=240, ignore_eos=True))
        engine.submit(request, endings.append)
        engine.cancel(request.id)
    until(lambda: engine.drain(0), 20)
    assert [chunk.finish for chunk in endings if chunk.finish] == ["cancelled"] * 5
    assert all(status.kv_used_bytes == 0 for status in settled(engine).values())


def test_what_cannot_be_answered_is_a_sentence(engine, client):
    with pytest.raises(openai.NotFoundError, match="did you mean"):
        ask(client, "a00", "x")
    with pytest.raises(InputError, match="empty"):
        engine.submit(TextRequest("none", ()), print)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "x"}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
        )  # fmt: skip
    last = []
    engine.submit(TextRequest("gone", (5, 6), (("sha256:" + "0" * 64, 1.0),)), last.append)
    until(lambda: last and last[-1].finish, 20)
    assert last[-1].finish == "error"
    assert "not here" in last[-1].error


def test_ray_asks_for_its_token_and_listens_on_loopback_where_it_lets_us(engine, library):
    import ray

    elsewhere = {
        (process.pid, connection.laddr.port)
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip.removeprefix("::ffff:") != "127.0.0.1"
    }
    # Ray Serve 2.60 binds each replica's own port to every address; nobody is heard there without the token either.
    assert {pid for pid, _ in elsewhere} == set(replicas(engine))
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_uid == os.getuid()
    assert token.parent.stat().st_mode & 0o77 == 0
    for _, port in elsewhere:
        assert refusal(port) == refusal(port, "wrong") == "UNAUTHENTICATED"
        assert refusal(port, token.read_text()) != "UNAUTHENTICATED"
    address = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HAORI_HOME": str(library[1])}
    for given, words in (
        ({}, "asks for its token"),
        ({"RAY_AUTH_TOKEN": "a" * 64}, "check the address, and the token"),
        ({"RAY_AUTH_TOKEN": token.read_text()}, "too few for 99 replicas"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "haori.cli.app", "serve", "--port", "0", "--base", str(library[0].path), "--ray",
             "--ray-address", address, "--replicas", "99", "--log-format", "text"],
            env={**environment, **given}, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def refusal(port, token=None):
    """Call a replica's own port with bytes that are no request; return the status."""
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def test_the_command_serves_drains_and_leaves_nothing_behind(library, tiny_base_folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "haori.cli.app", "serve", "--port", "0", "--base", str(tiny_base_folder), "--ray",
         "--replicas", "1:2", "--max-batch", "4", "--log-format", "text", "--weights", "fp32"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HAORI_HOME": str(library[1])},
    )  # fmt: skip
    children = []
    try:
        url = re.search(r"http://\S+:\d+", process.stdout.readline())[0]
        until(lambda: httpx.get(f"{url}/health").status_code == 200, 240)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        long = {"model": "a1", "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(60) == 0
        err = process.communicate()[1]
        assert "1 replica answers requests." in err
        assert all(re.match(r"20\d\d-", line) for line in err.splitlines()), err  # Ray does not write between our lines
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_replica_reads_an_adapter_before_it_gets_a_name(engine, library, tmp_path):
    """Sent whole to a replica, which answers with the sentence that a request would get."""
    from haori.library import inspect_adapter
    from tests.library_samples import change_tensors

    folder = strong_lora(library[0].path, tmp_path / "x", 9)
    engine.check_adapter(inspect_adapter(folder), "sha256:" + "0" * 64)
    change_tensors(folder, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    with pytest.raises(InputError, match="NaN or infinity"):
        engine.check_adapter(inspect_adapter(folder), "sha256:" + "0" * 64)
