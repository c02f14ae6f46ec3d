"""The training API over PostgreSQL: killed and begun again, many at once, and a database that goes away for a while."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from haori.core.settings import settings
from tests.conftest import build_tiny_base
from tests.integration.test_tinker_wire import _ask, _do, _told, request, step
from tests.postgres import away, postgres  # noqa: F401 - a fixture
from tests.tinker_server import Wire, training_process, training_server


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def database(postgres, haori_home, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HAORI_DATABASE", postgres)
    settings.cache_clear()
    yield postgres
    settings.cache_clear()


def saved(wire, model, number, name, **more):
    asked = {"model_id": model, "path": name, "seq_id": number, "type": "save_weights", **more}
    return wire.result(wire.post("/save_weights", **asked))["path"]


def for_sampling(wire, model, number, name):
    asked = {"model_id": model, "path": name, "seq_id": number, "type": "save_weights_for_sampler"}
    return wire.result(wire.post("/save_weights_for_sampler", **asked))["path"]


def sample(wire, session, number):
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
    asked = {"sampling_session_id": session, "seq_id": number, "num_samples": 1, "prompt": prompt,
             "sampling_params": {"max_tokens": 4, "temperature": 0.0}}  # fmt: skip
    return wire.result(wire.post("/asample", **asked)).hex()


def test_runs_checkpoints_and_samplers_go_on_after_kill_9(base, database):
    with training_process(base) as (process, url):
        wire = Wire(url)
        session = wire.session()
        model = wire.model(session, "tiny")
        found = [_do(wire, model, number) for number in range(1, 4)]
        path = saved(wire, model, 4, "one", user_metadata={"why": "a test"})
        weights = for_sampling(wire, model, 5, "two")
        asked = {"session_id": session, "sampling_session_seq_id": 0, "model_path": weights}
        sampler = wire.post("/create_sampling_session", **asked)["sampling_session_id"]
        drawn = sample(wire, sampler, 1)
        promises = [wire.forward_backward(request(model, number)) for number in (6, 7)] + [step(wire, model, 8)]
        process.kill()
        process.wait(20)
    with psycopg.connect(database) as held:
        assert held.execute("SELECT count(*) FROM training_runs").fetchone() == (1,), "it is this database that is used"
    with training_server(base) as (url, _):
        wire = Wire(url)
        assert _told(wire.result(_ask(wire, model, 2))) == found[1]
        later = [_told(wire.result(promise)) for promise in promises]
        assert sample(wire, sampler, 2) == drawn, "a sampler of a checkpoint is made again from it"
        assert {one["checkpoint_id"] for one in wire.get("/checkpoints")["checkpoints"]} == {
            "weights/one", "sampler_weights/two",
        }  # fmt: skip
        again = wire.post("/load_weights", session_id=session, model_seq_id=1, path=path, optimizer=True)
        assert wire.result(again)["path"] == path
        copy = f"{session}:train:1"
        assert later[2]["metrics"]["step"] == 2.0
        wire.result(wire.forward_backward(request(copy, 1)))
        assert wire.result(step(wire, copy, 2))["metrics"]["step"] == 2.0, "the optimizer's state came along"
        undisturbed = wire.model(wire.session(), "tiny")
        assert [_do(wire, undisturbed, number) for number in range(1, 4)] == found


def test_a_saved_state_is_found_again(base, monkeypatch):
    monkeypatch.setattr("haori.jobs.sessions.run._SAVE_AFTER_REQUESTS", 3)
    with training_server(base) as (url, _):
        wire = Wire(url)
        model = wire.model(wire.session(), "tiny")
        found = [_do(wire, model, number) for number in range(1, 9)]
        folder = settings().jobs / "sessions" / "runs" / model.replace(":", "_")
        end = time.monotonic() + 5
        while not list(folder.glob("state-000000006/answers/*6.npz")) or len(list(folder.glob("journal/*"))) > 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    with training_server(base) as (url, _):
        wire = Wire(url)
        assert _told(wire.result({"request_id": f"{model}:5"})) == found[4]
        assert _do(wire, model, 9)


def test_requests_that_come_twice_at_once_make_one_thing(base):
    with training_server(base) as (url, _), ThreadPoolExecutor(24) as pool:
        wire = Wire(url)

        def opened(key):
            headers = {"X-Idempotency-Key": key}
            body = {"tags": [], "sdk_version": "0.38.0", "type": "create_session"}
            reply = wire.http.post("/create_session", json=body, headers=headers)
            assert reply.status_code == 200, reply.text
            return key, reply.json()["session_id"]

        made = set(pool.map(opened, [f"key-{i % 4}" for i in range(96)]))
        assert len(made) == len({session for _, session in made}) == 4
        session = wire.session()

        def begun(_):
            asked = {"session_id": session, "model_seq_id": 0, "base_model": "tiny",
                     "lora_config": {"rank": 4, "seed": 1, "train_unembed": False}}  # fmt: skip
            return wire.result(wire.post("/create_model", **asked))["model_id"]

        assert set(pool.map(begun, range(24))) == {f"{session}:train:0"}


def test_what_is_too_long_for_a_column_is_the_clients_mistake(base):
    with training_server(base) as (url, service):
        wire = Wire(url)
        asked = {"tags": ["\0"], "sdk_version": "0" * 500, "type": "create_session", "user_metadata": {"a": "\0"}}
        reply = wire.http.post("/create_session", json=asked)
        assert reply.status_code == 400, reply.text
        assert "Traceback" not in service.log_text.getvalue()
        model = wire.model(wire.session(), "tiny")
        number = wire.http.post("/optim_step", json={"model_id": model, "seq_id": 1 << 40, "type": "optim_step"})
        assert number.status_code == 400, number.text


def test_a_database_that_goes_away_is_told_without_its_address_and_nothing_is_lost(base, database, monkeypatch):
    from sqlalchemy.engine import make_url

    monkeypatch.setattr("haori.jobs.sessions.service._SWEEP_EVERY_S", 0.05)
    with training_server(base) as (url, service):
        wire = Wire(url)
        session = wire.session()
        model = wire.model(session, "tiny")
        found = [_do(wire, model, number) for number in range(1, 3)]
        with away(database) as name:
            replies = [
                wire.http.post("/create_session", json={"tags": [], "sdk_version": "1", "type": "create_session"}),
                wire.http.get("/training_runs"), wire.http.get("/checkpoints"),
                wire.http.post("/session_heartbeat", json={"session_id": "a", "type": "session_heartbeat"}),
                wire.http.get(f"/training_runs/{model}"),
            ]  # fmt: skip
            refused = wire.post("/save_weights", model_id=model, path="one", seq_id=3, type="save_weights")
            failed = wire.result(refused)
            _do(wire, model, 4)  # what needs no database goes on
            time.sleep(0.2)
        parts = make_url(database)
        secret = [part for part in (name, parts.host, parts.query.get("host"), parts.username, "psycopg") if part]
        for said in [reply.text for reply in replies] + [json.dumps(failed)]:
            assert "does not answer" in said, said
            assert not [part for part in secret if part in said], said
        assert {reply.status_code for reply in replies} == {503}
        assert {reply.headers["retry-after"] for reply in replies} == {"1"}
        assert name in service.log_text.getvalue(), "the log says which database it was, and why"
        assert wire.get("/training_runs")["training_runs"][0]["training_run_id"] == model
        assert saved(wire, model, 5, "one").endswith("/weights/one")
        assert service.training._sweeper.is_alive()
    with training_server(base) as (url, _):
        wire = Wire(url)
        assert [_told(wire.result({"request_id": f"{model}:{number}"})) for number in (1, 2)] == found
        assert wire.forward_backward(request(model, 6))
