"""What runs report: the events of whole runs on a tiny base, against the files that the runs leave."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import haori
from haori.core.errors import TrainingError
from haori.core.events import EventReader, Failed, Finished, Measured, Progress, Said, Saved, Started
from haori.core.records import RunRecord
from haori.jobs.sweep.trial import run_trial
from tests.conftest import build_tiny_base

SETTINGS = [
    "training.epochs=2",
    "training.batch_tokens=400",
    "training.save_every=1",
    "method.rank=4",
    "optimizer.lr=5e-3",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"what is number {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(base: Path, data: Path, *overrides: str, **more):
    return haori.train(
        base=str(base), data=str(data), name="numbers", overrides=[*SETTINGS, *overrides], progress=False, **more
    )


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record_of(folder: Path) -> RunRecord:
    return RunRecord.model_validate_json((folder / "run.json").read_bytes())


def as_lines(events: list) -> list[dict]:
    """Return steps and validations as metrics.jsonl is documented to hold them."""
    lines = []
    for event in events:
        if event.kind == "progress":
            lines.append({"kind": "train", "step": event.step, "epoch": event.epoch, "loss": event.loss} | event.values)
        elif event.kind == "measured":
            lines.append({"kind": "validation", "step": event.step, "epoch": event.epoch} | event.values)
    return lines


def of_kind(events: list, kind: type) -> list:
    return [event for event in events if isinstance(event, kind)]


def stop_at(step: int, heard: list):
    def listen(event):
        heard.append(event)
        if event.kind == "progress" and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return listen


def test_a_run_reports_from_its_folder_to_its_end_with_the_figures_of_its_files(haori_home, tiny_base_folder, data):
    heard = []
    run = train(tiny_base_folder, data, on_event=heard.append)
    lines, record = lines_of(run.folder), record_of(run.folder)

    started, finished = heard[0], heard[-1]
    assert isinstance(started, Started)
    assert (started.work, started.name, started.task, started.step, started.unit) == (
        "run", "numbers", "causal_lm", 0, "tokens",
    )  # fmt: skip
    assert Path(started.folder) == run.folder
    assert finished == Finished(folder=str(run.folder), record=record, adapter="numbers@1")
    assert len(of_kind(heard, Started)) == len(of_kind(heard, Finished)) == 1
    assert not of_kind(heard, Failed)

    assert as_lines(heard) == lines
    assert next(list(line) for line in lines if line["kind"] == "train") == [
        "kind", "step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "seconds",
    ]  # fmt: skip
    assert all(type(line["tokens"]) is int for line in lines if line["kind"] == "train")
    steps = of_kind(heard, Progress)
    assert {step.total_steps for step in steps} == {started.total_steps} == {record.steps}
    assert [step.step for step in steps] == list(range(1, record.steps + 1))
    assert all(step.rate_per_s == step.values["tokens"] / step.values["seconds"] for step in steps)
    assert sum(step.values["tokens"] for step in steps) == record.cost
    assert all(0 < step.peak_memory_bytes <= record.peak_memory_bytes for step in steps)
    losses = {one.step: one.values["loss"] for one in of_kind(heard, Measured)}
    assert losses[record.best_step] == record.validation_loss
    assert losses[0] == record.initial_validation_loss

    saved = of_kind(heard, Saved)
    assert {one.step for one in saved if one.what == "checkpoint"} == set(range(1, record.steps + 1))
    assert (saved[-1].what, saved[-1].path, saved[-1].step) == (
        "adapter",
        str(run.folder / "adapter"),
        record.best_step,
    )
    assert heard.index(saved[-1]) > heard.index(steps[-1])
    assert any("Verifying" in line.text for line in of_kind(heard, Said))


def test_a_validation_holds_the_further_means_of_the_task(haori_home, tiny_base_folder, tmp_path):
    heard = []
    pairs = [{"prompt": f"what is {i}?", "chosen": f"it is {i}", "rejected": f"no idea {i % 5}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = train(tiny_base_folder, tmp_path / "pairs.jsonl", task="preference", on_event=heard.append)
    assert (heard[0].task, as_lines(heard)) == ("preference", lines_of(run.folder))
    assert all(0 <= one.values["accuracy"] <= 1 for one in of_kind(heard, Measured))
    assert of_kind(heard, Measured)[-1].values["margin"] > 0


def test_a_stopped_run_ends_with_its_signal_and_a_resumed_one_begins_where_it_stopped(
    haori_home, tiny_base_folder, data
):
    before, after, whole = [], [], []
    part = train(tiny_base_folder, data, on_event=stop_at(2, before))
    assert before[-1] == Finished(folder=str(part.folder), record=record_of(part.folder), signal=signal.SIGINT)
    assert before[-1].record.status == "stopped"
    saved = of_kind(before, Saved)[-1]
    assert (saved.what, Path(saved.path).is_dir(), saved.step) == ("checkpoint", True, 2)

    run = haori.resume(part.folder, progress=False, on_event=after.append)
    started = after[0]
    assert (started.kind, started.folder, started.step) == ("started", str(part.folder), 2)
    assert after[-1] == Finished(folder=str(part.folder), record=record_of(part.folder), adapter=run.adapter.name)
    assert as_lines(before) + as_lines(after) == lines_of(part.folder)
    assert [step.step for step in of_kind(after, Progress)] == list(range(3, started.total_steps + 1))

    train(tiny_base_folder, data, on_event=whole.append)
    losses = [step.loss for step in of_kind(whole, Progress)]
    assert [step.loss for step in of_kind([*before, *after], Progress)] == losses


def test_a_run_that_fails_ends_with_the_sentence_that_is_raised(haori_home, tmp_path, data):
    base = build_tiny_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    heard = []
    with pytest.raises(TrainingError) as raised:
        train(base, data, "data.validation_share=0", on_event=heard.append)
    assert heard[0].kind == "started"
    assert heard[-1] == Failed(text=str(raised.value), error="TrainingError")
    assert len(of_kind(heard, Failed)) == 1
    assert not of_kind(heard, Finished)
    assert record_of(Path(heard[0].folder)).status == "failed"


def test_what_is_wrong_before_there_is_a_folder_is_raised_and_not_reported(haori_home, tiny_base_folder, data):
    heard = []
    with pytest.raises(haori.HaoriError):
        train(tiny_base_folder, data, "method.target=nowhere", on_event=heard.append)
    assert heard == []


def test_a_subscriber_that_raises_ends_neither_run_nor_display(capsys, haori_home, tiny_base_folder, data):
    seen = []

    def broken(event):
        seen.append(event)
        raise RuntimeError("my script is wrong")

    recipe = haori.api.recipe_of(None, str(tiny_base_folder), str(data), "numbers", [*SETTINGS, "training.max_steps=2"])
    run = haori.train(recipe, on_event=broken)
    assert run.record.status == "finished"
    assert [event.kind for event in seen] == ["started"]
    said = capsys.readouterr().err
    assert said.count("my script is wrong") == 1
    assert "broken failed" in said
    assert "validation loss" in said
    assert "Verifying: reloading the saved adapter into a fresh base." in said


TRACKIO = """
logged, config = [], {}
def init(project, **settings): return Run()
def log(values, step=None, **more): logged.append((step, values))
class Run:
    def log(self, values, step=None, **more): log(values, step)
    def finish(self): logged.append("finished")
def finish(): logged.append("finished")
"""


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    """A tracker that notes what accelerate gives it, under the name of one that is not installed."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    from accelerate.utils import LoggerType

    # What is installed is looked for when accelerate is imported.
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TRACKIO])
    yield __import__("trackio")
    del sys.modules["trackio"]


def test_a_tracker_gets_the_figures_of_metrics_jsonl(haori_home, tiny_base_folder, data, trackio):
    run = train(tiny_base_folder, data, "training.trackers=[trackio]", "training.max_steps=3")
    wanted = [
        (
            line["step"],
            {f"{line['kind']}/{name}": value for name, value in line.items() if name not in ("kind", "step")},
        )
        for line in lines_of(run.folder)
    ]
    assert trackio.logged == [*wanted, "finished"]
    assert len(wanted) > 3


def test_a_tracker_that_fails_does_not_end_the_run(capsys, haori_home, tiny_base_folder, data, trackio, monkeypatch):
    def refuse(values, step=None, **more):
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(trackio, "log", refuse)
    monkeypatch.setattr(trackio.Run, "log", lambda self, values, step=None, **more: refuse(values))
    run = train(tiny_base_folder, data, "training.trackers=[trackio]", "training.max_steps=3")
    assert run.record.status == "finished"
    said = capsys.readouterr().err
    assert said.count("the server is gone") == 1
    assert "The experiment tracker failed" in said


def test_the_events_of_a_child_reach_the_parent_as_the_child_made_them(haori_home, tiny_base_folder, data, tmp_path):
    heard, pruned_on = [], []
    recipe = haori.api.recipe_of(None, str(tiny_base_folder), str(data), "numbers", [*SETTINGS, "training.max_steps=3"])

    def prune(number, loss):
        pruned_on.append((number, loss))
        return False

    outcome = run_trial(recipe, tmp_path / "0007", prune=prune, stop=lambda: False, on_event=heard.append)
    assert outcome.state == "finished"
    folder = Path(outcome.run)
    assert {event.job for event in heard} == {"0007"}
    assert heard[0].folder == str(folder)
    assert as_lines(heard) == lines_of(folder)
    assert heard[-1].record == record_of(folder)
    later = [one.values["loss"] for one in of_kind(heard, Measured) if one.step]
    assert pruned_on == list(enumerate(later, start=1))
    assert [EventReader().read(event.model_dump_json()) for event in heard] == heard


def test_a_comparison_reports_itself_and_each_of_its_runs(capsys, haori_home, tiny_base_folder, data):
    heard = []
    recipe = haori.api.recipe_of(None, str(tiny_base_folder), str(data), "numbers", [*SETTINGS, "training.max_steps=2"])
    _, folder = haori.compare(recipe, methods=["lora"], seeds=1, on_event=heard.append)
    own = [event for event in heard if event.job is None]
    started = Started(work="comparison", folder=str(folder), name="numbers", task="causal_lm")
    assert (own[0], own[-1]) == (started, Finished(folder=str(folder)))
    assert {event.kind for event in own[1:-1]} == {"said"}
    job = "lora-lr-auto-seed-0"
    assert {event.job for event in heard} == {None, "base", job}
    of_run = [event for event in heard if event.job == job]
    assert (of_run[0].kind, of_run[0].work) == ("started", "run")
    assert [event.step for event in of_kind(of_run, Progress)] == [1, 2]
    assert of_kind(of_run, Finished)[0].record == record_of(Path(of_run[0].folder))
    said = " ".join(capsys.readouterr().err.split())
    assert said == " ".join(event.text for event in of_kind(heard, Said))
