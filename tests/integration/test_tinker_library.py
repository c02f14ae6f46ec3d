"""What was trained through the training API becomes a library adapter: by the command line, and as it is saved."""

import os
import re
import subprocess
import sys
import time

import httpx
import pytest

from haori.bases import find_base
from haori.core.errors import InputError
from haori.core.settings import settings
from haori.library import Library, import_adapter
from haori.server.keys import KeyStore
from tests.command_line import haori
from tests.conftest import build_tiny_base
from tests.integration.test_tinker_wire import ROWS, loss_of, request, step
from tests.serving_process import strong_lora
from tests.tinker_server import Wire, training_process, training_server

CALLS = "/save_weights_for_sampler"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def command(*arguments):
    """Run the command line as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "haori.cli.app", *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"COLUMNS": "1000", "NO_COLOR": "1"},
    )  # fmt: skip


def trained(wire, model, start=1, last=6):
    """Train: every third request is a step; return the last loss."""
    loss = None
    for number in range(start, last + 1):
        if number % 3 == 0:
            wire.result(step(wire, model, number))
        else:
            loss = loss_of(wire.result(wire.forward_backward(request(model, number, scale=1 / number))))
    return loss


def saved(wire, model, number, name, **more):
    return wire.result(wire.post(CALLS, model_id=model, seq_id=number, path=name, **more))


def created(wire, session, number=0, **metadata):
    made = wire.post(
        "/create_model", session_id=session, model_seq_id=number, base_model="tiny",
        lora_config={"rank": 4, "seed": 1, "train_unembed": False}, user_metadata=metadata or None,
    )  # fmt: skip
    assert wire.result(made).get("error") is None
    return f"{session}:train:{number}"


def test_a_checkpoint_is_added_by_a_command_with_its_proof_lineage_and_licence(base, haori_home):
    with training_server(base) as (url, _):
        wire = Wire(url)
        model = created(wire, wire.session(), title="reviews \x1b[31m")
        loss = trained(wire, model)
        path = wire.result(wire.post("/save_weights", model_id=model, seq_id=7, path="final"))["path"]
    done = command("library", "add", path, "--base", base, "--name", "reviews", "--licence", "MIT")
    assert done.returncode == 0, done.stderr
    assert re.search(r"reviews@1 is in the library: \d+ checks passed", done.stdout)
    card = Library().get("reviews").card
    assert card.verification.passed
    assert len(card.verification.checks) > 5
    (run,) = card.client_runs
    assert run.run == model
    assert run.metadata == {"title": "reviews \x1b[31m"}
    assert (run.started_from, run.parent, run.steps) == ("fresh", None, 2)
    assert run.losses == {"cross_entropy": 4}
    assert (run.rows, run.tokens) == (12, 4 * sum(len(row) - 1 for row in ROWS))
    assert run.last_loss == "cross_entropy"
    assert run.last_figures["loss:sum"] == pytest.approx(loss, rel=1e-5)
    assert run.optimizer["learning_rate"] == 1e-2
    assert (run.checkpoint, run.request) == (path, 7)
    assert run.saved[:4] == card.created[:4]
    assert (card.origin, card.licence, card.data[0].licence) == ("trained", "MIT", "MIT")
    assert card.base.id == find_base(str(base)).id
    shown = command("library", "show", "reviews").stdout
    shown = " ".join(re.sub(r"[^\x20-\x7e\x1b]", " ", shown).split())
    for said in (
        model,
        "fresh weights",
        "2 steps",
        "4 of cross_entropy",
        "learning_rate 0.01",
        path,
        r"reviews \u001b",
    ):
        assert said in shown, said
    assert "\x1b" not in shown


def test_a_checkpoint_that_is_damaged_stays_out_of_the_library(base, haori_home, capsys):
    from safetensors.torch import load_file, save_file

    with training_server(base) as (url, _):
        wire = Wire(url)
        model = created(wire, wire.session())
        trained(wire, model)
        path = saved(wire, model, 7, "final")["path"]
    folder = settings().jobs / "sessions" / "checkpoints" / model.replace(":", "_") / "sampler_weights" / "final"
    weights = folder / "adapter_model.safetensors"

    def damage(value):
        tensors = {key: tensor * value if "lora_B" in key else tensor for key, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})

    damage(0.0)
    done = command("library", "add", path, "--base", base)
    assert done.returncode == 1
    sentence = " ".join(done.stderr.split())
    assert re.fullmatch(
        r"(Error: )?The adapter failed its proof \(delta: .*; effect: .* the adapter was lost\)\.", sentence
    ), sentence
    damage(float("nan"))
    assert "NaN" in haori(capsys, "library", "add", path, "--base", base).err
    (folder / "session.json").write_text("{")
    assert "session.json" in haori(capsys, "library", "add", path, "--base", base).err
    (folder / "session.json").unlink()
    assert "'session.json' is missing" in haori(capsys, "library", "add", path, "--base", base).err.replace("\n", " ")
    assert haori(capsys, "library", "add", f"tinker://{model}/weights/none").code == 2
    assert Library().list() == ()
    assert not list(Library().root.glob("adapters/*/*"))


def test_what_a_checkpoint_belongs_to_is_seen_to(base, haori_home, capsys, tmp_path):
    with training_server(base) as (url, _):
        wire = Wire(url)
        model = created(wire, wire.session())
        trained(wire, model)
        path = saved(wire, model, 7, "final")["path"]
    named = haori(capsys, "library", "add", path)
    assert named.code == 2
    assert "give it with --base" in named.err.replace("\n", " ")
    other = build_tiny_base(tmp_path / "tiny", seed=1)
    wrong = haori(capsys, "library", "add", path, "--base", other)
    assert wrong.code == 2
    assert "trained over the base" in wrong.err.replace("\n", " ")
    assert haori(capsys, "bases", "add", base).code == 0
    done = haori(capsys, "library", "add", path)
    assert done.code == 0, done.err
    assert Library().get("final").card.licence.startswith("LicenseRef") or "unknown" in done.out


def test_lineage_goes_through_runs_and_the_adapter_that_the_first_began_with(base, haori_home, tmp_path):
    from haori.jobs.sessions.adding import add_checkpoint
    from haori.jobs.sessions.paths import local_checkpoint
    from haori.library import ancestors, effective_licence

    found = find_base(str(base))
    start = import_adapter(strong_lora(base, tmp_path / "start", 3), found, name="start", licence="GPL-3.0-only")
    with training_server(base) as (url, _):
        wire = Wire(url)
        session = wire.session()
        new = {"session_id": session, "model_seq_id": 0, "path": "library:start", "optimizer": False}
        wire.result(wire.post("/load_weights", new, expect=200))
        first = f"{session}:train:0"
        trained(wire, first, 1, 3)
        state = wire.result(wire.post("/save_weights", model_id=first, seq_id=4, path="half"))["path"]
        new = {"session_id": session, "model_seq_id": 1, "path": state, "optimizer": True}
        wire.result(wire.post("/load_weights", new | {"user_metadata": {"title": "second"}}))
        second = f"{session}:train:1"
        wire.result(wire.forward_backward(request(second, 1)))
        path = saved(wire, second, 2, "end")["path"]
    stored = add_checkpoint(local_checkpoint(path), found, name="end")
    before, after = stored.card.client_runs
    assert (before.run, before.started_from, before.parent) == (first, "library:start@1", start.card.id)
    assert (before.checkpoint, before.steps, before.losses) == (state, 1, {"cross_entropy": 2})
    assert (after.run, after.started_from, after.steps) == (second, state, 0)
    assert after.losses == {"cross_entropy": 1}
    assert after.metadata == {"title": "second"}
    assert stored.card.parents == (start.card.id,)
    assert "GPL-3.0-only" in stored.card.licence
    verdict = effective_licence(stored.card, ancestors(stored))
    assert verdict.commercial == "unknown", "nobody said what the rows may be used for"
    again = add_checkpoint(local_checkpoint(path), found, name="end", licence="MIT")
    assert (again.name, again.card.licence) == ("end@1", "MIT"), "said later, of what is there already"
    assert {data.licence for data in Library().get("end@1").card.data} == {"MIT"}


def test_what_is_done_again_after_a_kill_is_counted_once(base, haori_home, monkeypatch):
    from haori.jobs.tenants.files import read_session

    def counted(wire, model, number, name):
        path = saved(wire, model, number, name)["path"]
        folder = settings().jobs / "sessions" / "checkpoints" / model.replace(":", "_") / "sampler_weights" / name
        assert path.endswith(name)
        (run,) = read_session(folder).runs
        return run

    monkeypatch.setenv("HAORI_TEST_SAVE_AFTER_REQUESTS", "4")
    with training_process(base) as (process, url):
        wire = Wire(url)
        model = created(wire, wire.session())
        trained(wire, model, 1, 8)
        folder = settings().jobs / "sessions" / "runs" / model.replace(":", "_")
        process.kill()
        process.wait(20)
    assert list(folder.glob("state-*")), "some of it was in a saved state"
    assert list(folder.glob("journal/*")), "and some was not"
    with training_server(base) as (url, _):
        wire = Wire(url)
        trained(wire, model, 9, 10)
        again = counted(wire, model, 11, "a")
        undisturbed = created(wire, wire.session())
        trained(wire, undisturbed, 1, 10)
        once = counted(wire, undisturbed, 11, "a")
    assert once.losses == {"cross_entropy": 7}
    assert once.steps == 3
    same = {"run", "checkpoint", "saved"}
    assert again.model_dump(exclude=same) == once.model_dump(exclude=same)


def answered(url, model, key=None):
    """Ask for an answer as clients of OpenAI do."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Is this good?"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def listed(url, key=None):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return {card["id"] for card in httpx.get(f"{url}/v1/models", headers=headers, timeout=60).json()["data"]}


def test_named_saves_become_versions_that_answer_at_once(base, haori_home):
    with training_server(base) as (url, _):
        wire = Wire(url)
        model = created(wire, wire.session(), **{"haori.library": "support", "title": "mine"})
        failed = wire.post(CALLS, model_id=model, seq_id=1, path="untrained")
        trained(wire, model, 2, 6)
        assert saved(wire, model, 7, None, sampling_session_seq_id=0).get("library") is None
        assert "library" not in wire.result(wire.post("/save_weights", model_id=model, seq_id=8, path="state"))
        assert "library" not in saved(wire, model, 9, None)
        exported = wire.post("/save_weights_external", model_id=model, seq_id=11, path="out")
        promise = wire.post(CALLS, model_id=model, seq_id=10, path="one")
        path = f"tinker://{model}/sampler_weights/untrained"
        found = wire.result(failed)
        assert found["category"] == "user"
        assert found["error"].startswith(f"The checkpoint was saved as {path}, but did not go into the library as")
        assert "failed its proof (" in found["error"]
        assert "exactly what the base does" in found["error"]
        assert path in [one["tinker_path"] for one in wire.get("/checkpoints")["checkpoints"]]
        assert wire.result(promise)["library"] == "support@1"
        assert wire.post(CALLS, model_id=model, seq_id=10, path="one") == promise, "a request that comes again"
        assert wire.result(promise)["library"] == "support@1"
        (stored,) = Library().list()
        assert stored.name == "support@1"
        assert stored.card.verification.passed
        assert stored.card.client_runs[-1].checkpoint == f"tinker://{model}/sampler_weights/one"
        assert stored.card.client_runs[-1].losses == {"cross_entropy": 3}
        texts = {name: answered(url, name) for name in ("tiny", "support@1", "support")}
        assert {answer.status_code for answer in texts.values()} == {200}
        said = {name: answer.json()["choices"][0]["message"]["content"] for name, answer in texts.items()}
        assert said["support"] == said["support@1"]
        assert said["support"] != said["tiny"]
        assert {"support", "support@1"} <= listed(url)
        assert not list((settings().jobs / "sessions" / "library").glob("*_train_*"))
        assert "library" not in wire.result(exported)
        urls = wire.get(f"/training_runs/{model}/checkpoints/external_weights/out/external_weights_urls")["urls"]
        assert set(urls) >= {"adapter_model.safetensors", "adapter_config.json"}
        assert "session.json" not in urls, "it tells of the run and its client"


def test_a_kill_between_library_and_promise_makes_no_second_version(base, haori_home, tmp_path, monkeypatch):
    mark = tmp_path / "added"
    monkeypatch.setenv("HAORI_TEST_PAUSE_ADDED", str(mark))
    monkeypatch.setenv("HAORI_TEST_SAVE_AFTER_REQUESTS", "3")
    with training_process(base) as (process, url):
        wire = Wire(url)
        model = created(wire, wire.session(), **{"haori.library": "support"})
        trained(wire, model)
        promise = wire.post(CALLS, model_id=model, seq_id=7, path="one")
        trained(wire, model, 8, 12)  # what comes after it is not saved as if it had been answered
        end = time.monotonic() + 60
        while not mark.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        process.kill()
        process.wait(20)
    assert [stored.name for stored in Library().list()] == ["support@1"]
    monkeypatch.delenv("HAORI_TEST_PAUSE_ADDED")
    with training_server(base) as (url, _):
        wire = Wire(url)
        assert wire.result(promise)["library"] == "support@1"
        assert wire.result(wire.post(CALLS, model_id=model, seq_id=7, path="one"))["library"] == "support@1"
    assert [stored.name for stored in Library().list()] == ["support@1"]


def test_the_same_request_done_again_with_other_last_bits_is_the_same_version(base, haori_home, tmp_path):
    from safetensors.torch import load_file, save_file

    from haori.jobs.sessions.adding import add_saved
    from haori.jobs.tenants.pool import TrainingPool
    from haori.jobs.tenants.records import AdamParams, AdapterSpec
    from tests.tenant_samples import rows

    path = "tinker://s:train:0/sampler_weights/a"
    pool = TrainingPool(find_base(str(base)))
    try:
        pool.create("t", AdapterSpec(rank=2, seed=1))
        pool.forward_backward("t", rows([9], seed=1), "cross_entropy")
        pool.optim_step("t", AdamParams(learning_rate=1e-2))
        folders = [
            pool.save("t", tmp_path / str(number), optimizer=False, checkpoint=path, request=number).result()
            for number in (3, 4)
        ]
    finally:
        pool.close()
    asked = {"base": str(base), "name": "support", "checkpoint": path, "lock": str(tmp_path / ".lock")}

    def added(number):
        return add_saved({**asked, "folder": str(folders[number - 3]), "request": number}, print)["name"]

    def change(folder):
        weights = folder / "adapter_model.safetensors"
        tensors = {key: tensor * 1.000001 for key, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})

    assert added(3) == "support@1"
    change(folders[0])
    assert added(3) == "support@1"
    change(folders[1])
    change(folders[1])
    assert added(4) == "support@2", "another request is another version"
    with pytest.raises(InputError, match="replaced by a later one"):
        add_saved({**asked, "folder": str(folders[1]), "request": 5}, print)


def test_names_that_are_not_allowed_are_refused_when_the_run_is_made(base, haori_home, tmp_path):
    found = find_base(str(base))
    import_adapter(strong_lora(base, tmp_path / "a", 1), found, name="shared")
    with training_server(base) as (url, _):
        keys, both = KeyStore(), ("infer", "train")
        acme, other = (keys.create(name, scopes=both).secret for name in ("acme", "other"))
        narrow = keys.create("narrow", scopes=both, adapters=["tiny", "team-*"]).secret
        admin = keys.create("admin", scopes=both, admin=True).secret
        number = iter(range(100))
        sessions = {key: Wire(url, key).session() for key in (acme, other, narrow, admin)}

        def asked(key, name, address="/create_model", **more):
            body = {"session_id": sessions[key], "model_seq_id": next(number), "base_model": "tiny",
                    "lora_config": {"rank": 2}, "user_metadata": {"haori.library": name}} | more  # fmt: skip
            return Wire(url, key).http.post(address, json=body)

        assert asked(acme, "support").status_code == 200
        for key, name, status, sentence in (
            (acme, "../x", 400, "cannot be called"),
            (acme, "a b", 400, "cannot be called"),
            (acme, "tiny", 400, "a base is called so"),
            (acme, 3, 400, "as text"),
            (other, "support", 400, "taken"),
            (acme, "shared", 400, "taken"),
            (narrow, "support", 403, "may not use adapters called 'support'"),
        ):
            refused = asked(key, name)
            assert refused.status_code == status, refused.text
            assert sentence in refused.json()["detail"]
        wrong = asked(acme, "x", user_metadata={"haori.libary": "support"})
        assert (wrong.status_code, "haori.library" in wrong.json()["detail"]) == (400, True)
        long = asked(acme, "x", user_metadata={"title": "x" * 20_000})
        assert (long.status_code, "16,384" in long.json()["detail"]) == (400, True)
        load = {"path": "library:shared", "optimizer": False, "lora_config": None}
        assert asked(other, "support", "/load_weights", **load).status_code == 400
        assert asked(narrow, "team-x").status_code == 200
        assert asked(acme, "support").status_code == 200
        assert asked(admin, "shared").status_code == 200, "everybody's, and an admin adds to it"
        import_adapter(strong_lora(base, tmp_path / "b", 2), found, name="support")
        assert answered(url, "support", acme).status_code == 200
        assert {"support", "support@1", "shared"} <= listed(url, acme)
        hidden = answered(url, "support", other)
        digits = Library().get("support").card.id.removeprefix("sha256:")[:12]
        assert [hidden.status_code, answered(url, digits, other).status_code] == [404, 404]
        assert not {"support", "support@1"} & listed(url, other)
        assert "shared" in listed(url, other)
        assert {"support", "support@1"} <= listed(url, admin)
