"""What one account has, no other sees: every route for files, jobs, models and webhooks with a stranger's key."""

import re

import httpx
import pytest

from haori.core.settings import settings
from haori.jobs.database.connection import open_database
from haori.jobs.model_names import ModelName
from haori.library import Library
from haori.serve import AdapterDirectory
from haori.server import KeyStore
from haori.server.jobs_service import open_job_service
from tests.library_samples import card_of, written_adapter
from tests.server_samples import RepeatingEngine, sample_base, served

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
OURS = ("/v1/files", "/v1/uploads", "/v1/fine_tuning", "/v1/fine-tunes", "/v1/webhook", "/v1/models")
OF_JOBS = [("GET", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/metrics"), ("GET", "/checkpoints"),
           ("DELETE", "")]  # fmt: skip
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def server(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HAORI_WEBHOOK_HOSTS", '["hooks.example.org"]')
    settings.cache_clear()
    engine = RepeatingEngine(tiny_tokenizer)
    engine.base = sample_base()
    jobs = open_job_service(open_database(), engine.base)
    directory = AdapterDirectory(Library(), engine.base.reference(), base_names=["tiny"])
    with served(engine, directory, home=tmp_path, jobs=jobs) as running:
        yield running


@pytest.fixture
def keys(tmp_path):
    store = KeyStore(tmp_path / "keys.json")
    made = {name: store.create(name, scopes=["infer", "train"], owner=owner).secret
            for name, owner in (("mine", "acme"), ("colleague", "acme"), ("stranger", "other"))}  # fmt: skip
    return {**made, "admin": store.create("admin", scopes=["infer", "train"], admin=True).secret}


def ask(server, key, method, path, **more):
    return httpx.request(
        method, f"{server.url}/v1{path}", headers={"authorization": f"Bearer {key}"}, timeout=30, **more
    )


def things(server, keys, tmp_path):
    """Make one of everything with the first key; return their names."""
    mine = keys["mine"]
    form = {"files": {"file": ("a.jsonl", ROW)}, "data": {"purpose": "fine-tune"}}
    file = ask(server, mine, "POST", "/files", **form).json()["id"]
    asked = {"bytes": 9, "filename": "a", "mime_type": "a/b", "purpose": "user_data"}
    upload = ask(server, mine, "POST", "/uploads", json=asked).json()["id"]
    job = ask(server, mine, "POST", "/fine_tuning/jobs", json={"model": "tiny", "training_file": file}).json()["id"]
    hook = ask(
        server, mine, "POST", "/webhook_endpoints",
        json={"name": "a", "url": "https://hooks.example.org/", "event_types": ["fine_tuning.job.failed"]},
    ).json()["id"]  # fmt: skip
    jobs = server.service.jobs
    folder = written_adapter(tmp_path / "adapter")
    reference = server.engine.base.reference()
    stored = Library().add(folder, "ft-a1", card_of(folder, reference))
    claimed = jobs.store.claim("w")
    made = jobs.names.all()[0]
    changes = {"adapter": stored.card.id, "library_name": stored.name}
    step = {**changes, "name": f"{made.name}:ckpt-step-3", "step": 3}
    names = [ModelName.model_validate({**made.model_dump(), **more}) for more in (changes, step)]
    jobs.names.put(names)
    result = {"model": made.name, "result_file": file, "checkpoints": [], "tokens": 1}
    assert jobs.store.finish(claimed, result)
    return file, upload, job, hook, made.name, stored


def test_every_route_with_a_strangers_key(server, keys, tmp_path):
    file, upload, job, hook, model, stored = things(server, keys, tmp_path)
    part, sent = {"files": {"data": ("data", b"abc")}}, {"training_file": file}
    routes = [
        ("GET", f"/files/{file}", {}), ("GET", f"/files/{file}/content", {}),
        ("POST", f"/uploads/{upload}/parts", part),
        ("POST", f"/uploads/{upload}/complete", {"json": {"part_ids": ["a"]}}),
        ("POST", f"/uploads/{upload}/cancel", {}), ("PUT", f"/uploads/{upload}/content?signature=a", {"content": ROW}),
        ("POST", f"/files/{upload}/preprocess", {}), ("POST", "/fine-tunes", {"json": {"model": "tiny", **sent}}),
        ("POST", "/fine-tunes", {"json": {"from_checkpoint": job, **sent}}),
        ("POST", "/fine-tunes", {"json": {"from_checkpoint": f"{model}:3", **sent}}),
        ("POST", "/fine-tunes/estimate-price", {"json": {"model": "tiny", **sent}}),
        ("POST", "/fine-tunes/preview", {"json": {"model": "tiny", **sent}}),
        ("GET", f"/fine-tunes/models/limits?model_name={job}", {}),
        ("GET", f"/fine-tunes/models/limits?model_name={model}", {}),
        ("GET", f"/finetune/download?ft_id={job}", {}),
        ("GET", f"/finetune/download?ft_id={job}&checkpoint_step=3", {}),
        *((way, f"/fine-tunes/{job}{rest}", {}) for way, rest in OF_JOBS),
        ("POST", "/fine_tuning/jobs", {"json": {"model": "tiny", "training_file": file}}),
        ("GET", f"/fine_tuning/jobs/{job}/download", {}),
        ("POST", "/fine_tuning/preview", {"json": {"model": "tiny", "training_file": file}}),
        ("POST", "/fine_tuning/estimate", {"json": {"model": "tiny", "training_file": file}}),
        ("GET", f"/fine_tuning/jobs/{job}", {}), ("GET", f"/fine_tuning/jobs/{job}/events", {}),
        ("GET", f"/fine_tuning/jobs/{job}/checkpoints", {}), ("POST", f"/fine_tuning/jobs/{job}/cancel", {}),
        ("POST", f"/fine_tuning/jobs/{job}/pause", {}), ("POST", f"/fine_tuning/jobs/{job}/resume", {}),
        ("GET", f"/webhook_endpoints/{hook}", {}), ("POST", f"/webhook_endpoints/{hook}", {"json": {"name": "b"}}),
        ("POST", f"/webhook_endpoints/{hook}/rotate_secret", {}),
        ("POST", f"/webhook_endpoints/{hook}/test", {"json": {"event_type": "fine_tuning.job.failed"}}),
        ("DELETE", f"/webhook_endpoints/{hook}", {}), ("DELETE", f"/files/{file}", {}),
        ("GET", f"/models/{model}", {}), ("DELETE", f"/models/{model}", {}),
    ]  # fmt: skip
    for path, methods in httpx.get(f"{server.url}/openapi.json").json()["paths"].items():
        if path.startswith(OURS) and "{" in path:  # a new route must be tried here too
            form = re.compile("/v1" + re.sub(r"\{[^}]*\}", "[^/]+", path.removeprefix("/v1")))
            for method in methods:
                tried = [
                    route for way, route, _ in routes
                    if way.lower() == method and form.fullmatch(f"/v1{route.partition('?')[0]}")
                ]  # fmt: skip
                assert tried, (method, path)
    before = server.service.jobs.names.all()
    for method, path, more in routes:
        reply = ask(server, keys["stranger"], method, path, **more)
        assert reply.status_code == 404, (method, path, reply.text)
        assert "acme" not in reply.text.replace(model, "")
    for path in ("/files", "/fine_tuning/jobs", "/fine-tunes", "/webhook_endpoints"):
        assert ask(server, keys["stranger"], "GET", path).json()["data"] == []
        assert len(ask(server, keys["colleague"], "GET", path).json()["data"]) == 1
    assert server.service.jobs.names.all() == before
    every = (model, f"{model}:ckpt-step-3", f"{model}:0.5", stored.name, "ft-a1", stored.card.id[:20],
             f"{stored.card.id.removeprefix('sha256:')[:12]}", f"ft-a1:0.0+{stored.name}:0.3")  # fmt: skip
    for name in every:
        body = {"model": name, "messages": HELLO}
        for path, sent in (("/chat/completions", body), ("/completions", {"model": name, "prompt": "a"})):
            assert ask(server, keys["stranger"], "POST", path, json=sent).status_code == 404, name
            for key in ("mine", "colleague", "admin"):
                reply = ask(server, keys[key], "POST", path, json={**sent, "max_tokens": 1})
                assert reply.status_code == 200, (name, key, reply.text)
    listed = {who: {held["id"] for held in ask(server, keys[who], "GET", "/models").json()["data"]} for who in keys}
    assert listed["stranger"] == {"tiny"}
    assert listed["mine"] == listed["colleague"] == listed["admin"] == {"tiny", model, f"{model}:ckpt-step-3"}
    own = ask(
        server, keys["stranger"], "POST", "/files", files={"file": ("a.jsonl", ROW)}, data={"purpose": "fine-tune"}
    )
    for name in ("ft-a1", stored.name, model):  # nor is it gone on from
        start = {"model": name, "training_file": own.json()["id"]}
        assert ask(server, keys["stranger"], "POST", "/fine_tuning/jobs", json=start).status_code in (400, 404)
    for name in (job, f"{job}:3", model, f"{model}:3"):
        start = {"from_checkpoint": name, "training_file": own.json()["id"]}
        for path in ("/fine-tunes", "/fine-tunes/estimate-price"):
            assert ask(server, keys["stranger"], "POST", path, json=start).status_code == 404, name
            assert ask(server, keys["mine"], "POST", path, json=start | {"training_file": file}).status_code == 200
    start = {"model": model, "training_file": file}
    going_on = ask(server, keys["colleague"], "POST", "/fine_tuning/jobs", json=start)
    assert going_on.status_code == 200, going_on.text
    assert server.service.jobs.store.find(going_on.json()["id"]).spec["recipe"]["from"] == stored.name
    assert ask(server, keys["colleague"], "DELETE", f"/models/{model}").json()["deleted"]
    assert (
        ask(server, keys["mine"], "POST", "/chat/completions", json={"model": model, "messages": HELLO}).status_code
        == 404
    )


def test_keys_for_one_thing_and_patterns(server, keys, tmp_path):
    things(server, keys, tmp_path)
    model = server.service.jobs.names.list("acme")[0].name
    store = KeyStore(tmp_path / "keys.json")
    infer = store.create("infer", owner="acme").secret
    named = store.create("named", owner="acme", adapters=["ft:tiny:acme:*"]).secret
    other = store.create("elsewhere", owner="acme", adapters=["support"]).secret
    body = {"model": model, "messages": HELLO, "max_tokens": 1}
    assert ask(server, infer, "GET", "/files").status_code == 403
    assert ask(server, infer, "DELETE", f"/models/{model}").status_code == 403
    assert ask(server, infer, "POST", "/chat/completions", json=body).status_code == 200
    assert ask(server, named, "POST", "/chat/completions", json=body).status_code == 200
    assert ask(server, other, "POST", "/chat/completions", json=body).status_code == 403
    few = store.create("few", scopes=["train"], max_jobs=1, owner="few").secret
    asked = ask(server, few, "POST", "/files", files={"file": ("a.jsonl", ROW)}, data={"purpose": "fine-tune"}).json()
    job = {"model": "tiny", "training_file": asked["id"]}
    assert ask(server, few, "POST", "/fine_tuning/jobs", json=job).status_code == 200
    assert ask(server, few, "POST", "/fine_tuning/jobs", json=job).status_code == 429
    bases = store.create("bases", scopes=["train"], bases=["smol*"], owner="few").secret
    assert ask(server, bases, "POST", "/fine_tuning/jobs", json=job).json()["error"]["code"] == "base_not_allowed"


def test_an_own_model_in_a_blend_opens_no_other_adapter(server, keys, tmp_path):
    things(server, keys, tmp_path)
    model = server.service.jobs.names.list("acme")[0].name
    folder = written_adapter(tmp_path / "shared", seed=7)
    shared = Library().add(folder, "shared", card_of(folder, server.engine.base.reference()))
    digits = shared.card.id.removeprefix("sha256:")[:12]
    store = KeyStore(tmp_path / "keys.json")
    patterns = ["ft:tiny:acme:*", f"{digits[:4]}*"]
    key = store.create("narrow", owner="acme", scopes=["infer", "train"], adapters=patterns).secret
    body = {"messages": HELLO, "max_tokens": 1}
    assert ask(server, key, "POST", "/chat/completions", json={**body, "model": f"{model}:0.5"}).status_code == 200
    for name in (digits, f"{model}:0.5+{digits}:0.5"):
        refused = ask(server, key, "POST", "/chat/completions", json={**body, "model": name})
        assert refused.status_code == 403, (name, refused.text)
    form = {"files": {"file": ("a.jsonl", ROW)}, "data": {"purpose": "fine-tune"}}
    file = ask(server, key, "POST", "/files", **form).json()["id"]
    for name in ("shared", digits):  # nor is it gone on from
        start = {"model": name, "training_file": file}
        assert ask(server, key, "POST", "/fine_tuning/jobs", json=start).status_code in (400, 403, 404), name
    start = {"model": "shared", "training_file": file}
    assert ask(server, keys["mine"], "POST", "/fine_tuning/jobs", json=start).status_code == 200
