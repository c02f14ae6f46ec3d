"""Files of weights over the training API: downloads by signed addresses, and copies."""

import json

import httpx
import pytest
from safetensors import safe_open

from haori.server.keys import KeyStore
from haori.server.tinker import routes_files
from tests.conftest import build_tiny_base
from tests.integration.test_tinker_wire import request, step
from tests.tinker_server import Wire, training_server
from tests.tinker_venv import tinker_clients  # noqa: F401 - a fixture

BOTH = ("infer", "train")
CLI = "import runpy, sys; sys.argv[0] = 'tinker'; runpy.run_module('tinker.cli', run_name='__main__')"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def served(base, haori_home):
    with training_server(base) as (url, service):
        yield url, service


def exported(wire):
    """Return a run, the address of its files, and their signed addresses."""
    run = wire.model(wire.session(), "tiny")
    path = wire.result(wire.post("/save_weights_external", model_id=run, seq_id=1, path="out"))["path"]
    assert path == f"tinker://{run}/external_weights/out"
    at = f"/training_runs/{run}/checkpoints/external_weights/out/external_weights_urls"
    return run, at, wire.get(at)["urls"]


def test_whoever_has_a_signed_address_has_that_file_for_an_hour_and_no_other(served, monkeypatch):
    url, _ = served
    keys = KeyStore()
    mine, other, infer = (
        keys.create(name, scopes=scopes).secret
        for name, scopes in (("a", BOTH), ("b", BOTH), ("c", ("infer",)))
    )  # fmt: skip
    wire = Wire(url, mine)
    run, at, urls = exported(wire)
    address = urls["adapter_config.json"]
    assert json.loads(httpx.get(address).content)["r"] == 4
    assert httpx.get(f"{url}/api/v1{at}").status_code == 401
    Wire(url, other).get(at, expect=404)
    Wire(url, infer).get(at, expect=403)
    bare, query = address.split("?")
    for tried in (
        bare,
        f"{bare}?{query[:-1]}",
        f"{bare}?{query.replace('expires=', 'expires=9')}",
        f"{bare}?expires=x&signature=y",
        f"{urls['adapter_model.safetensors'].partition('?')[0]}?{query}",
        f"{bare.rpartition('/')[0]}/..%2F..%2F..%2Fhaori.db?{query}",
        f"{bare.replace('/out/', '/none/')}?{query}",
    ):
        refused = httpx.get(tried)
        assert refused.status_code in (400, 403), (tried, refused.text)
        assert "get_external_weights_urls" in refused.text or "expires" in refused.text
    assert httpx.post(address).status_code in (404, 405)
    monkeypatch.setattr(routes_files, "_FOR_S", -1.0)
    assert "has expired" in httpx.get(wire.get(at)["urls"]["adapter_config.json"]).text
    wire.http.delete(f"/training_runs/{run}/checkpoints/external_weights/out")
    assert httpx.get(address).status_code == 404
    wire.get(at, expect=404)


def test_only_exported_weights_have_addresses_and_their_files_hold_no_optimizer(served):
    wire = Wire(served[0])
    run, _, urls = exported(wire)
    wire.result(wire.post("/save_weights", model_id=run, seq_id=2, path="a"))
    wire.get(f"/training_runs/{run}/checkpoints/weights/a/external_weights_urls", expect=404)
    assert not [name for name in urls if "optim" in name]
    assert str(wire.http.base_url).rstrip("/") in urls["adapter_model.safetensors"]


def test_the_tinker_command_downloads_a_checkpoint(tinker_clients, served, tmp_path):  # noqa: F811
    wire = Wire(served[0])
    run = wire.model(wire.session(), "tiny")
    path = wire.result(wire.post("/save_weights", model_id=run, seq_id=1, path="a"))["path"]
    script = tmp_path / "cli.py"
    script.write_text(CLI)
    arguments = ("checkpoint", "download", path, "--output", tmp_path / "got")
    said = tinker_clients.run(script, *arguments, TINKER_BASE_URL=served[0])
    (file,) = (tmp_path / "got").rglob("adapter_model.safetensors")
    with safe_open(file, "pt") as held:
        assert any(name.endswith("lora_A.weight") for name in held.keys()), said  # noqa: SIM118 - no mapping
    assert len(wire.get("/checkpoints")["checkpoints"]) == 1, "its temporary export is deleted"


def test_a_copy_stays_when_what_it_was_copied_from_goes(served):
    wire = Wire(served[0])
    session = wire.session()
    run = wire.model(session, "tiny")
    path = wire.result(wire.post("/save_weights", model_id=run, seq_id=1, path="a", user_metadata={"n": "1"}))["path"]
    placed = wire.post("/copy_weights", source_path=path, session_id=session, model_seq_id=7)["tinker_path"]
    assert placed == f"tinker://{session}:train:7/weights/a"
    assert wire.post("/copy_weights", source_path=path, session_id=session, model_seq_id=7)["tinker_path"] == placed
    free = wire.post("/copy_weights", source_path=path, destination_project_id="p", ttl_seconds=7200)["tinker_path"]
    assert "already" in wire.post("/copy_weights", source_path=path, session_id=session, model_seq_id=0, expect=400)[
        "detail"
    ]  # fmt: skip
    assert "neither" in wire.post("/copy_weights", source_path=path, session_id=session, expect=400)["detail"]
    wire.http.delete(f"/training_runs/{run}/checkpoints/weights/a")
    rows = {row["tinker_path"]: row for row in wire.get("/checkpoints")["checkpoints"]}
    assert set(rows) == {placed, free}
    assert rows[free]["user_metadata"] == {"n": "1"}
    assert [rows[path]["expires_at"] is None for path in (free, placed)] == [False, True]
    new = {"session_id": session, "model_seq_id": 8, "optimizer": True}
    assert wire.result(wire.post("/load_weights", {**new, "path": free}))["path"] == free
    copy = wire.get(f"/training_runs/{session}:train:7")
    assert (copy["lora_rank"], copy["base_model"]) == (4, "tiny")
    step = wire.post("/optim_step", model_id=f"{session}:train:7", seq_id=1, adam_params={"learning_rate": 1e-3})
    assert "no gradients" in wire.result(step)["error"], "the run of a copy begins with it"


def test_a_copy_becomes_the_library_adapter_that_its_source_becomes(served, base):
    from haori.bases import find_base
    from haori.jobs.sessions.paths import local_checkpoint
    from haori.library import import_adapter

    wire = Wire(served[0])
    run = wire.model(wire.session(), "tiny")
    wire.result(wire.forward_backward(request(run, 1)))
    wire.result(step(wire, run, 2))
    path = wire.result(wire.post("/save_weights", model_id=run, seq_id=3, path="a"))["path"]
    copied = wire.post("/copy_weights", source_path=path)["tinker_path"]
    stored = [import_adapter(local_checkpoint(one), find_base(str(base)), name=name) for one, name in
              ((path, "first"), (copied, "second"))]  # fmt: skip
    assert stored[0].card.id == stored[1].card.id, "the same weights"


def test_what_is_anothers_is_copied_once_it_is_published(served):
    url, _ = served
    keys = KeyStore()
    mine, other = (Wire(url, keys.create(name, scopes=BOTH).secret) for name in "ab")
    run = mine.model(mine.session(), "tiny")
    path = mine.result(mine.post("/save_weights", model_id=run, seq_id=1, path="a"))["path"]
    other.post("/copy_weights", source_path=path, expect=404)
    assert other.get("/sessions")["sessions"] == [], "nothing is left of what was refused"
    mine.post(f"/training_runs/{run}/checkpoints/weights/a/publish")
    copied = other.post("/copy_weights", source_path=path)["tinker_path"]
    assert [row["tinker_path"] for row in other.get("/checkpoints")["checkpoints"]] == [copied]
    mine.post("/copy_weights", source_path=copied, expect=404)
    theirs = {"source_path": path, "session_id": run.partition(":")[0], "model_seq_id": 5}
    other.post("/copy_weights", theirs, expect=404)
