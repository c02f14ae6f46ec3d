"""Requests of the training API that come again, because their reply was lost: nothing is made twice."""

import json
import time

import pytest

from haori.core.settings import settings
from haori.jobs.database.connection import open_database
from haori.jobs.sessions import request_keys
from haori.server.keys import KeyStore
from tests.conftest import build_tiny_base
from tests.tinker_proxy import losing_proxy
from tests.tinker_server import Wire, training_process, training_server
from tests.tinker_venv import tinker_clients  # noqa: F401 - a fixture

KEY = "stainless-python-retry-1"
PROMPT = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}, "sampling_params": {"max_tokens": 4}}
MAKING = ["create_session", "create_model", "optim_step", "forward_backward", "save_weights", "load_weights",
          "save_weights_for_sampler", "create_sampling_session", "asample"]  # fmt: skip
SDK = """
import json, sys
import tinker, torch
from tinker import types

service = tinker.ServiceClient(base_url=sys.argv[1])
trainer = service.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
ids, tensor = types.ModelInput.from_ints, types.TensorData.from_torch
data = [types.Datum(model_input=ids([5, 6, 7, 8, 9]), loss_fn_inputs={
    "target_tokens": tensor(torch.tensor([6, 7, 8, 9, 10])), "weights": tensor(torch.ones(5))})]
losses = []
for step in range(2):
    losses.append(trainer.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
    trainer.optim_step(types.AdamParams(learning_rate=5e-3)).result()
path = trainer.save_state("one").result().path
again = service.create_training_client_from_state(path).result()
sampler = trainer.save_weights_and_get_sampling_client().result()
tokens = sampler.sample(ids([5, 6]), 1, types.SamplingParams(max_tokens=4, temperature=0)).result().sequences[0].tokens
bare = service.create_sampling_client(base_model="tiny").result()
bare.sample(ids([5, 6]), 1, types.SamplingParams(max_tokens=2)).result()
rest = tinker.RestClient(base_url=sys.argv[1])
print(json.dumps({
    "losses": losses, "tokens": tokens,
    "runs": len(rest.list_training_runs().result().training_runs),
    "checkpoints": len(rest.list_user_checkpoints().result().checkpoints),
    "sessions": len(rest.list_sessions().result().sessions),
    "samplers": len(rest.get_session(service.holder.get_session_id()).result().sampler_ids)}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def served(base, haori_home):
    with training_server(base) as (url, service):
        yield url, service


def making(session, model, path):
    """Return requests that make something, each with a change that makes another of it."""
    new = {"session_id": session}
    lora = {"lora_config": {"rank": 2, "train_unembed": False}}
    return [
        ("create_session", {"tags": [], "sdk_version": "0.38.0"}, {"tags": ["b"]}),
        ("create_model", {**new, "model_seq_id": 3, "base_model": "tiny", **lora}, {"model_seq_id": 4}),
        ("load_weights", {**new, "model_seq_id": 5, "path": path, "optimizer": False}, {"model_seq_id": 6}),
        ("create_sampling_session", {**new, "sampling_session_seq_id": 1, "model_path": path},
         {"sampling_session_seq_id": 2}),
        ("save_weights", {"model_id": model, "seq_id": 3, "path": "b"}, {"seq_id": 4, "path": "c"}),
        ("save_weights_for_sampler", {"model_id": model, "seq_id": 4, "path": "b"}, {"seq_id": 5, "path": "c"}),
        ("copy_weights", {"source_path": path}, {"ttl_seconds": 7200}),
        ("asample", {**PROMPT, "base_model": "tiny"}, {"num_samples": 2}),
    ]  # fmt: skip


def began(wire):
    session = wire.session()
    model = wire.model(session, "tiny")
    path = wire.result(wire.post("/save_weights", model_id=model, seq_id=1, path="a"))["path"]
    wire.result(wire.post("/save_weights_for_sampler", model_id=model, seq_id=2, path="a"))
    return session, model, path


def counted(wire):
    lists = ("sessions", "training_runs", "checkpoints")
    return {name: len(wire.get(f"/{name}")[name]) for name in lists}


def test_a_key_that_comes_again_is_answered_as_before_and_another_body_is_refused(served):
    wire = Wire(served[0])
    for number, (address, body, change) in enumerate(making(*began(wire))):
        wire.http.headers["x-idempotency-key"] = f"{KEY}{number}"
        first = wire.post(f"/{address}", body)
        if "request_id" in first:
            wire.result(first)
        made = counted(wire)
        assert wire.post(f"/{address}", body) == first, address
        assert counted(wire) == made, address
        said = wire.post(f"/{address}", body | change, expect=400)["detail"]
        assert "another request" in said, address
        assert counted(wire) == made, address
        wire.http.headers["x-idempotency-key"] = f"other-{number}"
        assert wire.post(f"/{address}", body | change) != first, address


def test_the_same_key_of_another_account_is_another_key(served):
    keys = KeyStore()
    both = ("infer", "train")
    wires = [Wire(served[0], keys.create(name, scopes=both).secret, **{"x-idempotency-key": KEY}) for name in "ab"]
    sessions = [wire.post("/create_session", tags=[name]) for wire, name in zip(wires, "ab", strict=True)]
    assert sessions[0] != sessions[1]
    for wire in wires:
        wire.http.headers["x-idempotency-key"] = "k"
    samples = [wire.post("/asample", {**PROMPT, "base_model": "tiny", "num_samples": n + 1}) for n, wire in
               enumerate(wires)]  # fmt: skip
    assert [len(one["sample_sequence_ids"]) for one in samples] == [1, 2]


def test_a_name_that_was_made_by_another_request_is_not_taken_for_it(served):
    wire = Wire(served[0])
    for address, body, _ in making(*began(wire))[1:4]:
        first = wire.post(f"/{address}", body)
        assert wire.post(f"/{address}", body) == first
        other = {"lora_config": {"rank": 3}} if address == "create_model" else {"user_metadata": {"a": "b"}}
        other = {"base_model": "tiny", "model_path": None} if address == "create_sampling_session" else other
        assert "another request" in wire.post(f"/{address}", body | other, expect=400)["detail"]


def test_what_was_refused_takes_no_name(served):
    wire = Wire(served[0])
    session, model, path = began(wire)
    new = {"session_id": session, "model_seq_id": 5, "optimizer": False}
    wire.post("/load_weights", {**new, "path": f"tinker://{model}/weights/none"}, expect=404)
    assert "request_id" in wire.post("/load_weights", {**new, "path": path})


def test_a_key_is_remembered_after_kill_9(base, haori_home):
    with training_process(base) as (process, url):
        wire = Wire(url)
        asked = making(*began(wire))
        firsts = []
        for number, (address, body, _) in enumerate(asked):
            wire.http.headers["x-idempotency-key"] = f"{KEY}{number}"
            firsts.append(wire.post(f"/{address}", body))
        process.kill()
        process.wait(20)
    with training_server(base) as (url, _):
        wire = Wire(url)
        for number, (address, body, change) in enumerate(asked):
            wire.http.headers["x-idempotency-key"] = f"{KEY}{number}"
            assert wire.post(f"/{address}", body) == firsts[number], address
            if address != "asample":  # samples are in memory: the promise is the same, and they are begun again
                assert "another request" in wire.post(f"/{address}", body | change, expect=400)["detail"], address
        for first in firsts:
            if "request_id" in first:
                wire.result(first)
        assert counted(wire) == {"sessions": 3, "training_runs": 4, "checkpoints": 5}


def test_keys_are_kept_for_a_day_and_not_without_bound(haori_home, monkeypatch):
    database = open_database()
    keys = request_keys.RequestKeys(database)
    keys.claim("a", "old", "one")
    monkeypatch.setattr(request_keys, "KEEP_S", 0.0)
    keys.sweep()
    keys.claim("a", "old", "two")
    monkeypatch.undo()
    monkeypatch.setattr(request_keys, "_MOST", 2)
    for number in range(3):
        time.sleep(0.002)
        keys.claim("a", str(number), "one")
    keys.sweep()
    keys.claim("a", "0", "two")
    with pytest.raises(request_keys.InputError, match="another request"):
        keys.claim("a", "2", "two")
    database.close()
    assert settings().database_file.is_file()


def test_the_sdk_goes_on_when_the_first_reply_of_every_call_is_lost(tinker_clients, served, tmp_path):  # noqa: F811
    script = tmp_path / "sdk.py"
    script.write_text(SDK)
    undisturbed = json.loads(tinker_clients.run(script, served[0]).strip().splitlines()[-1])
    with losing_proxy(served[0], MAKING) as (url, passed):
        found = json.loads(tinker_clients.run(script, url, timeout_s=120).strip().splitlines()[-1])
    for name in MAKING:
        assert sum(address == name for address, _ in passed) >= 2, name
    one = {"runs": 2, "checkpoints": 1, "sessions": 1}
    assert {name: undisturbed[name] for name in one} == one
    assert {name: found[name] for name in one} == {name: 2 * count for name, count in one.items()}
    assert found["samplers"] == undisturbed["samplers"] == 2
    assert (found["losses"], found["tokens"]) == (undisturbed["losses"], undisturbed["tokens"])
