"""The training API by hand: order and repetition of requests, hostile ones, strangers, kills and restarts."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from haori.server.keys import KeyStore
from haori.server.tinker.schema import message
from tests.conftest import build_tiny_base
from tests.tinker_server import Wire, training_process, training_server

ROWS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def served(base, haori_home):
    with training_server(base) as (url, service):
        yield url, service


def request(model, seq_id, rows=ROWS, loss="cross_entropy", scale=1.0, **fields):
    sent = message("ForwardBackwardRequest")
    sent.model_id, sent.seq_id, sent.loss_fn = model, seq_id, loss
    for row in rows:
        datum = sent.data.add()
        datum.model_input.add().encoded_text.tokens = np.int32(row[:-1]).tobytes()
        for name, values, dtype in (
            ("target_tokens", np.int64(row[1:]), 2),
            ("weights", np.full(len(row) - 1, scale, np.float32), 1),
        ):
            tensor = datum.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = values.tobytes(), dtype
            tensor.shape.append(len(values))
    for name, value in fields.items():
        setattr(sent, name, value)
    return sent.SerializeToString()


def loss_of(body):
    found = message("ForwardBackwardOutput")
    found.ParseFromString(body)
    return found.metrics["loss:sum"]


def step(wire, model, seq_id, lr=1e-2):
    return wire.post("/optim_step", model_id=model, seq_id=seq_id, adam_params={"learning_rate": lr}, type="optim_step")


def test_requests_that_come_late_wait_and_those_that_come_twice_are_answered_once(served):
    wire = Wire(served[0])
    model = wire.model(wire.session(), "tiny")
    second, third = step(wire, model, 2), wire.forward_backward(request(model, 3))
    with pytest.raises(httpx.ReadTimeout):
        wire.http.post("/retrieve_future", json={"request_id": second["request_id"]}, timeout=0.4)
    first = wire.forward_backward(request(model, 1))
    before, after = loss_of(wire.result(first)), loss_of(wire.result(third))
    assert after < before - 0.1
    again = wire.forward_backward(request(model, 1))
    assert again == first
    assert step(wire, model, 2) == second
    assert wire.result(second)["metrics"]["step"] == 1.0
    fourth = wire.result(step(wire, model, 4))
    assert fourth["metrics"]["step"] == 2.0, "the repeated step was not done again"


def test_a_failed_request_says_whose_fault_it_was_and_the_next_goes_on(served):
    wire = Wire(served[0])
    model = wire.model(wire.session(), "tiny")
    unpublished = wire.result(wire.forward_backward(request(model, 1, loss="stable_reinforce")))
    assert unpublished["category"] == "user"
    assert "importance_sampling" in unpublished["error"]
    beyond = wire.result(wire.forward_backward(request(model, 2, rows=[[5, 4000]])))
    assert beyond["category"] == "user"
    assert "4000" in beyond["error"]
    assert "no gradients" in wire.result(step(wire, model, 3))["error"]
    assert loss_of(wire.result(wire.forward_backward(request(model, 4)))) > 0


def test_what_is_not_lawful_is_refused_with_its_reason(served):
    wire = Wire(served[0])
    session = wire.session()
    model = wire.model(session, "tiny")
    said = wire.post(
        "/create_model",
        session_id=session,
        model_seq_id=1,
        base_model="Qwen/Qwen9",
        lora_config={"rank": 4},
        expect=400,
    )
    assert "'tiny'" in said["detail"]
    assert (
        "lora_config"
        in wire.post("/create_model", session_id=session, model_seq_id=1, base_model="tiny", expect=400)["detail"]
    )
    assert "from 1" in wire.forward_backward(request(model, 0), expect=400)["detail"]
    assert "far ahead" in wire.forward_backward(request(model, 1 << 30), expect=400)["detail"]
    assert "compressed" in wire.forward_backward(b"x", expect=415, **{"content-encoding": "zstd"})["detail"]
    assert "protobuf" in wire.forward_backward(b"\xff", expect=400)["detail"]
    assert "promise" in wire.post("/retrieve_future", request_id="nothing", expect=410)["detail"]
    assert "not kept" in wire.post("/retrieve_future", request_id=f"{model}:77", expect=410)["detail"]
    assert "session" in wire.post("/session_heartbeat", session_id="x", expect=410)["detail"]
    assert "/api/v1/nothing" in wire.get("/nothing", expect=404)["detail"]
    assert (
        "'surprise'"
        in wire.post("/optim_step", model_id=model, seq_id=1, adam_params={}, surprise=3, expect=400)["detail"]
    )
    assert (
        "adamw"
        in wire.post("/optim_step", model_id=model, seq_id=1, adam_params={"type": "dimuon"}, expect=400)["detail"]
    )
    wire.result(step(wire, model, 1))
    late = wire.post("/load_weights", model_id=model, seq_id=2, path=f"tinker://{model}/weights/x", optimizer=False)
    assert "not permitted with seq_id 2" in wire.result(late)["error"]
    for path in (
        "/etc/passwd",
        "tinker://../weights/x",
        f"tinker://{model}/weights/..",
        f"tinker://{model}/weights/a/b",
        "library:../x",
    ):
        refused = wire.http.post(
            "/load_weights", json={"session_id": session, "model_seq_id": 5, "path": path, "optimizer": False}
        )
        assert refused.status_code in (400, 404), refused.text
    named = wire.post("/save_weights", model_id=model, seq_id=3, path="../../x")
    assert "cannot be called" in wire.result(named)["error"]


@pytest.mark.parametrize(
    ("method", "address", "says"),
    [
        ("GET", "/training_runs/a:train:0/checkpoints/weights/b/archive", "save_weights_external"),
        ("POST", "/retrieve_futures", "retrieve_future"),
        ("POST", "/join_sampling_session", "joined"),
        ("POST", "/create_custom_loss", "forward_backward_custom"),
        ("POST", "/auth/token", "X-API-Key"),
        ("GET", "/billing/usage/events", "billed"),
    ],
)
def test_a_known_address_that_is_not_answered_says_why(served, method, address, says):
    answer = Wire(served[0]).http.request(method, address, json={} if method == "POST" else None)
    assert (answer.status_code, answer.json()["code"]) == (400, "not_offered")
    assert says in answer.json()["detail"]


def test_a_name_that_is_taken_is_kept_unless_it_may_be_replaced(served):
    wire = Wire(served[0])
    model = wire.model(wire.session(), "tiny")
    assert wire.result(wire.post("/save_weights", model_id=model, seq_id=1, path="a"))["path"].endswith("/weights/a")
    assert "already" in wire.result(wire.post("/save_weights", model_id=model, seq_id=2, path="a"))["error"]
    assert "path" in wire.result(wire.post("/save_weights", model_id=model, seq_id=3, path="a", overwrite=True))


def test_a_session_that_is_asked_for_twice_is_one(served):
    wire = Wire(served[0], **{"x-idempotency-key": "stainless-python-retry-1"})
    assert wire.session() == wire.session()
    assert Wire(served[0]).session() != Wire(served[0]).session()


def test_a_token_that_stops_ends_the_sample_and_is_its_last(served):
    wire = Wire(served[0])
    params = {"max_tokens": 12, "temperature": 1.0, "seed": 5}
    asked = {"base_model": "tiny", "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}}

    def sample(**more):
        found = message("SampleResponse")
        found.ParseFromString(
            wire.result(wire.post("/asample", {**asked, "sampling_params": params | more, "num_samples": 2}))
        )
        return [(np.frombuffer(one.tokens, np.int32).tolist(), one.stop_reason) for one in found.sequences]

    free = sample(stop=[])
    assert [len(tokens) for tokens, _ in free] == [12, 12]
    assert free[0] != free[1]
    assert sample(stop=[]) == free, "a seed repeats"
    stop = free[0][0][4]
    cut = sample(stop=[stop])
    assert cut[0] == (free[0][0][: free[0][0].index(stop) + 1], 0)


def test_a_stranger_gets_nothing_of_anothers(served):
    url, _ = served
    keys = KeyStore()
    _, mine = keys.create("mine", scopes=("infer", "train"))
    _, other = keys.create("other", scopes=("infer", "train"))
    _, infer = keys.create("infer", scopes=("infer",))
    assert Wire(url).http.get("/training_runs").status_code == 401
    wire = Wire(url, mine)
    session = wire.session()
    model = wire.model(session, "tiny")
    promise = wire.forward_backward(request(model, 1))
    wire.result(promise)
    path = wire.result(wire.post("/save_weights", model_id=model, seq_id=2, path="a"))["path"]
    sampler = wire.result(wire.post("/save_weights_for_sampler", model_id=model, seq_id=3, sampling_session_seq_id=0))
    sampler = sampler["sampling_session_id"]
    prompt = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5]}]}, "sampling_params": {"max_tokens": 1}}
    sampled = wire.post("/asample", {"sampling_session_id": sampler, "seq_id": 0, **prompt})
    new, base = {"session_id": session, "model_seq_id": 9}, "tiny"
    tries = [
        ("POST", "/session_heartbeat", {"session_id": session}),
        ("POST", "/create_model", {**new, "base_model": "tiny", "lora_config": {"rank": 2}}),
        ("POST", "/get_info", {"model_id": model}),
        ("POST", "/optim_step", {"model_id": model, "seq_id": 4, "adam_params": {}}),
        ("POST", "/save_weights", {"model_id": model, "seq_id": 4}),
        ("POST", "/save_weights_for_sampler", {"model_id": model, "seq_id": 4, "sampling_session_seq_id": 3}),
        ("POST", "/load_weights", {"session_id": session, "model_seq_id": 9, "path": path, "optimizer": True}),
        ("POST", "/load_weights", {"model_id": model, "seq_id": 4, "path": path, "optimizer": True}),
        ("POST", "/create_sampling_session", {"session_id": session, "sampling_session_seq_id": 4, "base_model": base}),
        ("POST", "/asample", {"sampling_session_id": sampler, "seq_id": 1, **prompt}),
        ("POST", "/retrieve_future", {"request_id": promise["request_id"]}),
        ("POST", "/retrieve_future", {"request_id": sampled["request_id"]}),
        ("POST", "/cancel_future", {"request_id": sampled["request_id"]}),
        ("GET", f"/samplers/{sampler}", None),
        ("GET", f"/training_runs/{model}", None),
        ("GET", f"/training_runs/{model}/checkpoints", None),
        ("DELETE", f"/training_runs/{model}/checkpoints/weights/a", None),
        ("PUT", f"/training_runs/{model}/checkpoints/weights/a/ttl", {"ttl_seconds": 1}),
        ("POST", f"/training_runs/{model}/checkpoints/weights/a/publish", {}),
        ("DELETE", f"/training_runs/{model}/checkpoints/weights/a/publish", None),
        ("POST", "/weights_info", {"tinker_path": path}),
        ("GET", f"/sessions/{session}", None),
        ("POST", f"/sessions/{session}/finish", {}),
    ]  # fmt: skip
    stranger = Wire(url, other)
    for method, address, body in tries:
        answer = stranger.http.request(method, address, json=body)
        assert answer.status_code in (404, 410), (address, answer.text)
    assert stranger.forward_backward(request(model, 4), expect=404)
    own = stranger.session()
    loaded = stranger.http.post(
        "/load_weights", json={"session_id": own, "model_seq_id": 0, "path": path, "optimizer": True}
    )
    assert loaded.status_code == 404
    assert stranger.get("/training_runs")["training_runs"] == []
    assert stranger.get("/checkpoints")["checkpoints"] == []
    assert stranger.get("/sessions")["sessions"] == [own]
    weak = Wire(url, infer)
    for method, address, body in tries[1:8] + tries[14:21]:
        assert weak.http.request(method, address, json=body).status_code == 403, address
    assert weak.forward_backward(request(model, 4), expect=403)
    assert wire.result(step(wire, model, 4))["metrics"]["step"] == 1.0, "nobody took its number"
    assert len(wire.get("/checkpoints")["checkpoints"]) == 1
    wire.post(f"/training_runs/{model}/checkpoints/weights/a/publish")
    published = stranger.post("/load_weights", session_id=own, model_seq_id=0, path=path, optimizer=True)
    assert stranger.result(published)["path"] == path


def test_a_run_goes_on_where_it_was_after_kill_9_in_the_middle(base):
    with training_process(base) as (process, url):
        wire = Wire(url)
        model = wire.model(wire.session(), "tiny")
        found = [_do(wire, model, number) for number in range(1, 4)]
        promises = [_ask(wire, model, number) for number in range(4, 9)]
        process.kill()
        process.wait(20)
    with training_server(base) as (url, _):
        wire = Wire(url)
        assert _told(wire.result(_ask(wire, model, 2))) == found[1], "an answer that was had is given again"
        found += [_told(wire.result(promise)) for promise in promises]
        found += [_do(wire, model, number) for number in (9, 10)]
        undisturbed = wire.model(wire.session(), "tiny")
        assert [_do(wire, undisturbed, number) for number in range(1, 11)] == found


def _ask(wire, model, number):
    return (
        step(wire, model, number)
        if number % 3 == 0
        else wire.forward_backward(request(model, number, scale=1 / number))
    )


def _do(wire, model, number):
    return _told(wire.result(_ask(wire, model, number)))


def _told(result):
    return result if isinstance(result, dict) else result.hex()


def test_a_saved_state_shortens_the_journal_and_keeps_the_numbers(base, monkeypatch):
    from haori.core.settings import settings

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
        found += [_do(wire, model, number) for number in range(9, 13)]
        assert _told(wire.result({"request_id": f"{model}:5"})) == found[4]
    monkeypatch.undo()
    with training_server(base) as (url, _):
        wire = Wire(url)
        model = wire.model(wire.session(), "tiny")
        assert [_do(wire, model, number) for number in range(1, 13)] == found


def test_a_run_that_was_put_away_comes_back_when_it_is_spoken_to(served):
    url, service = served
    wire = Wire(url)
    session = wire.session()
    model = wire.model(session, "tiny")
    first = _do(wire, model, 1)
    service.training.runs.put_away({session})
    assert service.training._pool.status().tenants in ((), (model,))
    assert _do(wire, model, 2) != first
    assert wire.result(step(wire, model, 3))["metrics"]["step"] == 1.0


def test_many_requests_at_once_wait_for_no_pool_of_connections(served):
    url, service = served
    wire = Wire(url)
    session = wire.session()
    models = [wire.model(session, "tiny", number) for number in range(8)]
    limits = httpx.Limits(max_connections=64)
    prompt = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 2},
    }
    with httpx.Client(base_url=f"{url}/api/v1", timeout=60, limits=limits) as http, ThreadPoolExecutor(64) as threads:

        def train(number):
            return http.post("/forward_backward", content=request(models[number % 8], number // 8 + 1, rows=ROWS[:1]))

        def sample(number):
            return http.post("/asample", json={"base_model": "tiny", **prompt})

        promised = [*threads.map(train, range(200)), *threads.map(sample, range(512))]
        assert {answer.status_code for answer in promised} == {200}
        got = list(
            threads.map(
                lambda answer: http.post("/retrieve_future", json={"request_id": answer.json()["request_id"]}), promised
            )
        )
    assert {answer.headers["content-type"] for answer in got} == {"application/x-protobuf"}
    assert "QueuePool" not in service.log_text.getvalue()


def test_a_checkpoint_becomes_a_library_adapter_and_a_run_begins_from_it(served, base):
    from haori.bases import find_base
    from haori.jobs.sessions.paths import local_checkpoint
    from haori.library import import_adapter

    wire = Wire(served[0])
    session = wire.session()
    model = wire.model(session, "tiny")
    for number in range(1, 7):
        _do(wire, model, number)
    path = wire.result(wire.post("/save_weights", model_id=model, seq_id=7, path="a"))["path"]
    trained = loss_of(wire.result(wire.forward_backward(request(model, 8, forward_only=True))))
    import_adapter(local_checkpoint(path), find_base(str(base)), name="trained")
    new = {"session_id": session, "model_seq_id": 1, "path": "library:trained", "optimizer": False}
    assert wire.result(wire.post("/load_weights", new))["path"] == "library:trained@1"
    other = f"{session}:train:1"
    assert loss_of(wire.result(wire.forward_backward(request(other, 1, forward_only=True)))) == trained


def test_a_library_name_means_the_version_of_the_moment_that_it_was_taken_up(base, haori_home, tmp_path):
    from haori.bases import find_base
    from haori.library import Library, import_adapter
    from tests.serving_process import strong_lora

    found = find_base(str(base))
    for seed in (1, 2):
        import_adapter(strong_lora(base, tmp_path / str(seed), seed), found, name="start")
    Library().promote("start@1")
    prompt = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
              "sampling_params": {"max_tokens": 8, "temperature": 0}}  # fmt: skip

    def sampled(wire, sampler, number):
        asked = wire.post("/asample", {"sampling_session_id": sampler, "seq_id": number, **prompt})
        return wire.result(asked)

    def asked_for(session):
        new = {"session_id": session, "model_seq_id": 1, "path": "library:start", "optimizer": False}
        old = {"model_id": f"{session}:train:0", "seq_id": 1, "path": "library:start", "optimizer": False}
        sampler = {"session_id": session, "sampling_session_seq_id": 0, "model_path": "library:start"}
        return new, old, sampler

    with training_server(base) as (url, _):
        wire = Wire(url)
        session = wire.session()
        wire.model(session, "tiny")
        new, old, sampler = asked_for(session)
        paths = [wire.result(wire.post("/load_weights", one))["path"] for one in (new, old)]
        sampler_id = wire.post("/create_sampling_session", sampler)["sampling_session_id"]
        assert paths == ["library:start@1"] * 2
        assert wire.get(f"/samplers/{sampler_id}")["model_path"] == "library:start@1"
        ask = [(f"{session}:train:1", 1), (f"{session}:train:0", 2)]
        losses = [loss_of(wire.result(wire.forward_backward(request(*one, forward_only=True)))) for one in ask]
        tokens = sampled(wire, sampler_id, 0)
    Library().promote("start@2")
    with training_server(base) as (url, _):
        wire = Wire(url)
        again = [
            loss_of(wire.result(wire.forward_backward(request(model, number + 1, forward_only=True))))
            for model, number in ask
        ]
        assert again == losses, "the version that it began with, and not the one promoted since"
        for body, address in ((new, "/load_weights"), (sampler, "/create_sampling_session")):
            wire.post(address, body)  # comes a second time, and was taken up before
        assert wire.get(f"/samplers/{sampler_id}")["model_path"] == "library:start@1"
        assert sampled(wire, sampler_id, 1) == tokens
        other_path = wire.post("/create_sampling_session", sampler | {"model_path": "library:start@2"}, expect=400)[
            "detail"
        ]
        assert "library:start@1" in other_path
        other = wire.session()
        exact = {"session_id": other, "model_seq_id": 0, "path": "library:start@1", "optimizer": False}
        assert wire.result(wire.post("/load_weights", exact))["path"] == "library:start@1"
        later = {"session_id": other, "model_seq_id": 1, "path": "library:start", "optimizer": False}
        assert wire.result(wire.post("/load_weights", later))["path"] == "library:start@2"
        found = [
            loss_of(wire.result(wire.forward_backward(request(f"{other}:train:{number}", 1, forward_only=True))))
            for number in (0, 1)
        ]
        assert found[0] == losses[0]
        assert found[1] != losses[0]


def test_a_version_that_was_taken_away_and_made_anew_is_not_taken_for_the_old_one(base, haori_home, tmp_path):
    from haori.bases import find_base
    from haori.library import Library, import_adapter
    from tests.serving_process import strong_lora

    found = find_base(str(base))
    import_adapter(strong_lora(base, tmp_path / "1", 1), found, name="start")
    with training_server(base) as (url, _):
        wire = Wire(url)
        session = wire.session()
        new = {"session_id": session, "model_seq_id": 0, "path": "library:start", "optimizer": False}
        wire.result(wire.post("/load_weights", new))
    Library().remove("start")
    import_adapter(strong_lora(base, tmp_path / "2", 2), found, name="start")
    with training_server(base) as (url, _):
        wire = Wire(url)
        said = wire.forward_backward(request(f"{session}:train:0", 1), expect=410)["detail"]
        assert "library:start@1" in said


def test_a_library_adapter_of_another_account_is_not_there(served, base, tmp_path):
    from haori.bases import find_base
    from haori.jobs.database.connection import open_database
    from haori.jobs.model_names import ModelName, ModelNames
    from haori.library import import_adapter
    from tests.serving_process import strong_lora

    keys = KeyStore()
    both = ("infer", "train")
    owner, other = (Wire(served[0], keys.create(name, scopes=both).secret) for name in ("acme", "other"))
    narrow = Wire(served[0], keys.create("narrow", scopes=both, adapters=["tiny", "0*", "1*", "a*", "f*"]).secret)
    found = find_base(str(base))
    theirs = import_adapter(strong_lora(base, tmp_path / "a", 1), found, name="ft-a1")
    everybodys = import_adapter(strong_lora(base, tmp_path / "b", 2), found, name="shared")
    row = {"name": "ft:tiny:acme::a1", "owner": "acme", "base": "tiny", "created": 1.0}
    names = ModelNames(open_database())
    names.put([ModelName(**row, adapter=theirs.card.id, library_name=theirs.name)])

    def tried(wire, path):
        session = wire.session()
        load = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": False}
        sampler = {"session_id": session, "sampling_session_seq_id": 1, "model_path": path}
        asked = (("/load_weights", load), ("/create_sampling_session", sampler))
        return [wire.http.post(address, json=body) for address, body in asked]

    def digits(stored):
        return stored.card.id.removeprefix("sha256:")[:12]

    for name in ("ft-a1", "ft-a1@1", digits(theirs), "ft-a2"):
        for answer in tried(other, f"library:{name}"):
            assert answer.status_code == 404, (name, answer.text)
            assert "ft-a1" not in answer.text.replace(name, "")
    for wire, name in ((owner, "ft-a1"), (owner, "ft-a1@1"), (other, "shared"), (owner, "shared")):
        assert [answer.status_code for answer in tried(wire, f"library:{name}")] == [200, 200], name
    for name in ("shared", digits(everybodys)):  # by neither a name that its key does not have nor by an id
        assert all(answer.status_code in (403, 404) for answer in tried(narrow, f"library:{name}")), name


def test_runs_beyond_those_in_memory_are_put_away_and_come_back_as_they_were(served, monkeypatch):
    from haori.jobs.sessions import runs

    url, service = served
    wire = Wire(url)
    session = wire.session()
    alone = wire.model(session, "tiny", seed=5)
    expected = [_do(wire, alone, number) for number in range(1, 7)]
    monkeypatch.setattr(runs, "MOST_LIVE", 2)
    models = [wire.model(wire.session(), "tiny", seed=5) for _ in range(3)]
    found = {model: [] for model in models}
    for number in range(1, 7):
        for model in models:
            found[model].append(_do(wire, model, number))
            assert len(service.training.runs._live) <= 2
    assert all(one == expected for one in found.values())
