"""Events: through JSON and back, of versions to come, and to subscribers that fail."""

import json
import math
import subprocess
import sys
import time

import pytest

from haori.core.events import (
    EventReader,
    Failed,
    Finished,
    Measured,
    Progress,
    Said,
    Saved,
    Started,
    Warned,
    fan_out,
    reporting_failure,
)
from haori.core.records import Advice, RunRecord

STEP = Progress(
    step=3, total_steps=9, epoch=1 / 3, loss=0.1 + 0.2, rate_per_s=1234.5, unit="tokens", peak_memory_bytes=2**33,
    values={"lr": 1e-5, "tokens": 120},
)  # fmt: skip
RECORD = RunRecord(
    name="mood", status="finished", started="2026-01-01T00:00:00+00:00", best_step=3, validation_loss=1 / 7,
    ranks={"q": 4, "k": (1, 2)}, diagnosis=("It fits.",),
    advice=(Advice(action="Train longer", reason="it fell", changes={"training.epochs": 4}),),
)  # fmt: skip
EVENTS = (
    Started(folder="/runs/a b", name="mood", task="causal_lm", step=2, total_steps=9, unit="tokens"),
    Started(work="sweep", folder="/sweeps/é", name="mood", task="causal_lm"),
    STEP,
    STEP.with_fields(job="lora-seed-1"),
    Measured(step=3, epoch=1.0, values={"loss": 1 / 3, "train_loss": 1e-300, "accuracy": 1.0}),
    Saved(what="checkpoint", path="/runs/a b/checkpoints/step-00000003", step=3),
    Warned(text="line\nline"),
    Said(text="[bold] — “quoted” \x1b"),
    Finished(folder="/runs/a b", record=RECORD, adapter="mood@1"),
    Finished(folder="/runs/a b", signal=2),
    Failed(text="The loss became nan.", error="TrainingError", job="x"),
)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_an_event_comes_back_equal_from_one_line_of_json(event):
    line = event.model_dump_json()
    assert "\n" not in line
    assert json.loads(line)["kind"] == event.kind
    reader = EventReader()
    back = reader.read(line)
    assert back == event
    assert type(back) is type(event)
    assert not reader.skipped


def test_every_kind_is_tried_above():
    from typing import get_args

    from haori.core.events import Event

    assert {type(event) for event in EVENTS} == set(get_args(Event))


def test_whole_numbers_stay_whole_and_figures_that_are_not_finite_are_json_that_others_read():
    given = STEP.with_fields(loss=math.inf, values={"tokens": 120, "worst": -math.inf, "none": math.nan})
    line = given.model_dump_json()
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    back = EventReader().read(line)
    assert (back.loss, back.values["worst"]) == (math.inf, -math.inf)
    assert math.isnan(back.values["none"])
    assert type(back.values["tokens"]) is int


def test_what_a_later_version_adds_is_passed_over_and_counted():
    reader = EventReader()
    longer = json.loads(EVENTS[8].model_dump_json()) | {"colour": "red"}
    longer["record"] |= {"watts": 3.5}
    assert reader.read(json.dumps(longer)) == EVENTS[8]
    assert reader.read('{"kind": "drawn", "picture": "a.png"}') is None
    assert reader.read(b'{"kind": "drawn"}') is None
    assert reader.read('{"kind": "progress", "step": "three"}') is None
    assert reader.read(STEP.model_dump_json()) == STEP
    assert reader.skipped == {"drawn": 2, "progress": 1}


@pytest.mark.parametrize("line", ["", "Loading weights: 3%", "[1]", "3", '{"text": "a"}', '{"kind": 3}', b"\xff", "{"])
def test_a_line_that_is_no_event_is_refused(line):
    reader = EventReader()
    with pytest.raises(ValueError):
        reader.read(line)
    assert not reader.skipped


def test_a_sink_that_raises_is_left_out_and_named_once(capsys):
    before, after = [], []

    def broken(event):
        raise OSError("no network")

    sink = fan_out(before.append, broken, after.append)
    for event in EVENTS:
        sink(event)
    assert before == after == list(EVENTS)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "broken failed (OSError: no network)" in said.err


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_asks_for_the_end_passes(kind):
    def interrupt(event):
        raise kind

    with pytest.raises(kind):
        fan_out(interrupt)(STEP)


def test_a_failure_is_reported_and_passes():
    heard = []
    with pytest.raises(KeyError), reporting_failure(heard.append):
        raise KeyError
    with pytest.raises(ValueError, match="two"), reporting_failure(heard.append):
        raise ValueError("one\n  two")
    with reporting_failure(heard.append):
        pass
    assert heard == [
        Failed(text="It ended with KeyError.", error="KeyError"),
        Failed(text="one two", error="ValueError"),
    ]


def test_events_load_no_torch():
    code = "import sys; import haori.core.events; assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_thousand_events_cost_less_than_one_step_of_the_smallest_model():
    heard = []
    sink = fan_out(heard.append)
    values = {"lr": 1e-3, "grad_norm": 1.0, "tokens": 1000, "trained_tokens": 100, "seconds": 0.1}
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        for step in range(1000):
            sink(
                Progress(
                    step=step, total_steps=1000, epoch=0.5, loss=1.0, rate_per_s=3.0, unit="tokens",
                    peak_memory_bytes=1, values=values,
                )
            )  # fmt: skip
        best = min(best, time.perf_counter() - started)
    assert best < 0.1  # 100 us each under any load; about 3 us on an idle core
