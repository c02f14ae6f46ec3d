"""What was trained through the training API becomes a library adapter: by the command line, and as it is saved."""

import os
import re
import subprocess
import sys

import pytest

from haori.bases import find_base
from haori.core.settings import settings
from haori.library import Library, import_adapter
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
