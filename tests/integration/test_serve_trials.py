"""What servers of adapters are known to get wrong, tried one by one on `haori serve` itself over HTTP.

One server with ten adapters and memory for two of them; what each says alone comes from PEFT.
"""

import json
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from haori.bases import find_base
from haori.library import import_adapter, open_adapter
from tests.library_samples import change_tensors
from tests.server_samples import until
from tests.serving_process import serving, strong_lora

NAMES = [f"a{i}" for i in range(10)]
QUESTION = [{"role": "user", "content": "Is this review positive?"}]
TOKENS = 12


class Trial:
    """A running server, what its adapters say alone, and folders to load adapters from."""

    def __init__(self, http, base, roots, alone):
        self.http = http
        self.base = base
        self.roots = roots
        self.alone = alone

    def ask(self, model, **options):
        body = {"model": model, "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, **options}
        return self.http.post("/v1/chat/completions", json=body)

    def says(self, model, **options):
        reply = self.ask(model, **options)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"]

    def detail(self, model, **options):
        """Bytes of each token, and the first one's log probability: it tells apart what happens to say the same."""
        found = self.ask(model, logprobs=True, **options).json()["choices"][0]["logprobs"]["content"]
        return [token["bytes"] for token in found], found[0]["logprob"]

    def load(self, name, path, **options):
        return self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **options})

    def unload(self, name):
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def models(self):
        return {card["id"]: card for card in self.http.get("/v1/models").json()["data"]}

    def figure(self, name):
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def trial(tiny_base_folder, tmp_path_factory):
    from haori.core.settings import settings

    home, roots = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("roots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(home))
        settings.cache_clear()
        base = find_base(str(tiny_base_folder))
        alone = {}
        for number, name in enumerate(NAMES):
            import_adapter(strong_lora(tiny_base_folder, tmp_path_factory.mktemp(name), number), base, name=name)
            opened = open_adapter(name, base_spec=str(tiny_base_folder), dtype="fp32")
            alone[name] = opened.answer(QUESTION, max_new_tokens=TOKENS)
            with opened.strength(False):
                alone[base.name] = opened.answer(QUESTION, max_new_tokens=TOKENS)
        assert len(set(alone.values())) > 6
        size = next((home / "library").rglob("adapter_model.safetensors")).stat().st_size
        options = ("--base", tiny_base_folder, "--weights", "fp32", "--adapter-root", roots, "--max-batch", 4)
        with (
            serving(*options, "--adapter-memory", f"{5 * size // 2}B") as (_, url, _),
            httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=200)) as http,
        ):
            yield Trial(http, base, roots, alone)
    settings.cache_clear()


def told(trial, folder):
    """What stock PEFT says with an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trial.base.path), folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(trial.base.path)
        prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            found = model.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=int),
                max_new_tokens=TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
    return tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)


def test_models_show_their_lineage(trial):
    cards = trial.models()
    assert cards[trial.base.name]["parent"] is None
    for name in NAMES:
        assert cards[name]["parent"] == trial.base.name
        assert cards[f"{name}@1"]["root"] == cards[name]["root"]
        assert cards[name]["root"] != cards["a0"]["root"] or name == "a0"


def test_ten_adapters_and_the_base_at_once_with_memory_for_two_say_what_they_say_alone(trial):
    loads = trial.figure("haori:adapter_loads_total")
    asked = [*NAMES, trial.base.name] * 4
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(trial.says, asked)) == [trial.alone[name] for name in asked]
    assert trial.figure("haori:adapter_loads_total") >= loads + 8


def test_another_adapter_between_does_not_change_what_one_says_and_each_keeps_its_own_prefixes(trial):
    long = [{"role": "user", "content": "Answer the question of the user. " * 6}]
    first, other = (trial.detail(name, messages=long) for name in ("a0", "a1"))
    assert abs(first[1] - other[1]) > 0.01
    hits = trial.figure("vllm:prefix_cache_hits_total")
    for name, wanted in (("a0", first), ("a1", other), ("a0", first)):
        tokens, logprob = trial.detail(name, messages=long)
        assert tokens == wanted[0]
        assert logprob == pytest.approx(wanted[1], abs=1e-4)
    assert trial.figure("vllm:prefix_cache_hits_total") > hits


def test_strengths_side_by_side(trial):
    models = ["a0:0.25", "a0:0.5", "a0:1.0", "a0:2", "a0:-1", "a0:0.4+a1:0.6", "a0", "a1:0.6+a0:0.4"]
    one_by_one = [trial.detail(model) for model in models]
    with ThreadPoolExecutor(len(models)) as pool:
        for (tokens, logprob), wanted in zip(pool.map(trial.detail, models), one_by_one, strict=True):
            assert tokens == wanted[0]
            assert logprob == pytest.approx(wanted[1], abs=1e-4)
    logprobs = [logprob for _, logprob in one_by_one]
    assert len({round(logprob, 3) for logprob in logprobs[:6]}) == 6
    assert logprobs[6:] == [pytest.approx(logprobs[2], abs=1e-4), pytest.approx(logprobs[5], abs=1e-4)]
    assert trial.says("a0:1.0") == trial.alone["a0"]


def test_replacing_an_adapter_changes_its_answers_but_not_those_that_run(trial):
    place = trial.roots / "replaced"
    strong_lora(trial.base.path, place, 30)
    before = told(trial, place)
    assert trial.load("replaced", place).text == "Success: LoRA adapter 'replaced' added successfully."
    assert trial.says("replaced") == before
    whole = {"model": "replaced", "prompt": "user", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    old = trial.http.post("/v1/completions", json=whole).json()["choices"][0]["text"]
    with trial.http.stream("POST", "/v1/completions", json={**whole, "stream": True}) as reply:
        lines = reply.iter_lines()
        pieces = [next(lines)]
        shutil.rmtree(place)
        strong_lora(trial.base.path, place, 31)
        after = told(trial, place)
        assert after != before
        assert trial.load("replaced", place).status_code == 400  # it must be said that this is meant
        assert trial.load("replaced", place, load_inplace=True).status_code == 200
        assert trial.says("replaced") == after
        pieces += [line for line in lines if line]
    texts = [json.loads(piece[6:])["choices"][0]["text"] for piece in pieces if piece.startswith("data: {")]
    assert "".join(texts) == old
    assert trial.http.post("/v1/completions", json=whole).json()["choices"][0]["text"] != old
    assert trial.unload("replaced").status_code == 200


def test_a_retrained_name_is_served_without_restart_and_the_old_version_stays(trial, tmp_path, monkeypatch):
    from haori.core.settings import settings

    home = trial.models()["a9@1"]["root"].partition("/library/")[0]
    monkeypatch.setenv("HAORI_HOME", home)
    settings.cache_clear()
    folder = strong_lora(trial.base.path, tmp_path / "new", 40)
    import_adapter(folder, trial.base, name="a9")
    assert trial.says("a9") == trial.says("a9@2") == told(trial, folder)
    assert trial.says("a9@1") == trial.alone["a9"]


def test_files_changed_beneath_a_registered_name_are_never_served_as_the_old(trial):
    place = strong_lora(trial.base.path, trial.roots / "changed", 50)
    assert trial.load("changed", place).status_code == 200
    assert trial.says("changed") == told(trial, place)
    change_tensors(place, lambda tensors: [value.mul_(-1) for value in tensors.values()])
    for name in NAMES[:4]:  # brings "changed" out of memory
        trial.says(name)
    reply = trial.ask("changed")
    assert reply.status_code == 400
    assert "register it again" in reply.json()["error"]["message"]
    assert trial.load("changed", place, load_inplace=True).status_code == 200
    assert trial.says("changed") == told(trial, place)
    assert trial.unload("changed").status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"lora_name": "a0", "lora_path": "a1"}, 400),
        ({"lora_name": "new"}, 400),
        ({"lora_path": "a0"}, 400),
        ({"lora_name": "new", "lora_path": "nobody"}, 404),
        ({"lora_name": "new", "lora_path": "../../etc"}, 404),
        ({"lora_name": "new", "lora_path": "/etc"}, 404),
        ({"lora_name": "new", "lora_path": "..\\..\\etc"}, 404),
        ({"lora_name": "new", "lora_path": "%2e%2e/etc"}, 404),
        ({"lora_name": "new", "lora_path": "x\0y"}, 404),
        ({"lora_name": "../../new", "lora_path": "a0"}, 400),
        ({"lora_name": "a+b", "lora_path": "a0"}, 400),
        ({"lora_name": 3, "lora_path": "a0"}, 400),
        ('{"lora_name": "new", ', 400),
        ("", 400),
    ],
)
def test_loads_that_are_refused(trial, body, status):
    before = trial.models().keys()
    sent = {"content": body} if isinstance(body, str) else {"json": body}
    reply = trial.http.post("/v1/load_lora_adapter", headers={"content-type": "application/json"}, **sent)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]
    assert trial.models().keys() == before


def test_a_clash_with_the_base_a_link_to_the_outside_and_a_name_that_is_not_loaded(trial, tmp_path):
    assert trial.load(trial.base.name, "a0").status_code == 400
    outside = strong_lora(trial.base.path, tmp_path / "outside", 1)
    (trial.roots / "link").symlink_to(outside)
    assert trial.load("link", trial.roots / "link").status_code == 404
    assert trial.unload("nobody").status_code == 404
    (trial.roots / "link").unlink()


def spoilt(trial):
    """Folders that hold no adapter that can be served: cut off, NaN, a header without end, another base's shapes."""

    def made(name, change):
        folder = strong_lora(trial.base.path, trial.roots / name, 60)
        change(folder / "adapter_model.safetensors")
        return folder

    def nan(path):
        change_tensors(path.parent, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))

    def wide(path):
        change_tensors(
            path.parent, lambda t: t.update({k: torch.cat([v, v], 1) for k, v in t.items() if "lora_A" in k})
        )

    return [
        made("cut", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        made("header", lambda path: path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])),
        made("noise", lambda path: path.write_bytes(bytes(range(256)) * 20)),
        made("empty", lambda path: path.write_bytes(b"")),
        made("nan", nan),
        made("wide", wide),
    ]


def test_fifty_bad_loads_leave_good_traffic_alone(trial):
    folders = spoilt(trial)
    before = trial.models().keys()
    end, wrong = threading.Event(), []

    def good():
        number = 0
        while not end.is_set():
            name = NAMES[number % 5]
            said = trial.says(name)
            if said != trial.alone[name]:
                wrong.append((name, said))
            number += 1
        return number

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(good) for _ in range(3)]
        try:
            for number in range(50):
                name = f"bad{number}"
                reply = trial.load(name, folders[number % len(folders)])
                if reply.status_code == 200:  # what only its numbers show is refused when it is used
                    asked = trial.ask(name)
                    assert asked.status_code == 400, asked.text
                    assert trial.unload(name).status_code == 200
                else:
                    assert reply.status_code == 400, reply.text
                    assert "Traceback" not in reply.text
                assert trial.ask(name).status_code == 404
        finally:
            end.set()
        assert min(future.result() for future in running) > 3
    assert not wrong
    assert trial.models().keys() == before


def test_a_flood_of_unknown_names_costs_the_others_nothing(trial):
    lines = len(trial.http.get("/metrics").text.splitlines())
    with ThreadPoolExecutor(24) as pool:
        unknown = [pool.submit(trial.ask, f"nobody-{number}") for number in range(300)]
        known = [pool.submit(trial.says, "a2") for _ in range(6)]
        assert {future.result().status_code for future in unknown} == {404}
        assert {future.result() for future in known} == {trial.alone["a2"]}
    assert len(trial.http.get("/metrics").text.splitlines()) <= lines + 2  # a2's own, if this was its first


def test_a_hot_adapter_does_not_starve_the_others(trial):
    ended = []

    def ask(name):
        trial.says(name, max_tokens=24, ignore_eos=True)
        ended.append(name)

    with ThreadPoolExecutor(64) as pool:
        hot = [pool.submit(ask, "a3") for _ in range(48)]
        while len(ended) < 4:
            assert not hot[-1].done()
        others = [pool.submit(ask, name) for name in ("a4", "a5", trial.base.name)]
        for future in (*hot, *others):
            future.result()
    assert max(ended.index(name) for name in ("a4", "a5", trial.base.name)) < 36


def test_unloading_lets_running_answers_end(trial):
    place = strong_lora(trial.base.path, trial.roots / "leaving", 70)
    assert trial.load("leaving", place).status_code == 200
    whole = {"model": "leaving", "prompt": "user", "max_tokens": 150, "ignore_eos": True, "temperature": 0}
    text = trial.http.post("/v1/completions", json=whole).json()["choices"][0]["text"]
    with trial.http.stream("POST", "/v1/completions", json={**whole, "stream": True}) as reply:
        lines = reply.iter_lines()
        first = next(lines)
        assert trial.unload("leaving").status_code == 200
        assert trial.ask("leaving").status_code == 404
        assert "leaving" not in trial.models()
        rest = [line for line in lines if line]
    pieces = [json.loads(line[6:])["choices"][0]["text"] for line in (first, *rest) if line.startswith("data: {")]
    assert "".join(pieces) == text
    assert rest[-1] == "data: [DONE]"


def test_clients_that_leave_in_the_middle_leave_nothing_behind(trial):
    long = {"model": "a6", "prompt": "user", "max_tokens": 200, "ignore_eos": True, "stream": True}
    for _ in range(8):
        with trial.http.stream("POST", "/v1/completions", json=long) as reply:
            next(reply.iter_lines())
    assert trial.says("a7") == trial.alone["a7"]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(trial.says, "a6").result(30) == trial.alone["a6"]
    busy = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    until(lambda: all(trial.figure(name) == 0 for name in busy))  # figures are of the step before
