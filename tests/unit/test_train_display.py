"""What the display of training shows, on a terminal and elsewhere."""

import io

import pytest
from rich.console import Console

from haori.core.events import Failed, Finished, Measured, Progress, Said, Started, Warned
from haori.training import TrainingDisplay


def step(number: int, **more) -> Progress:
    return Progress(
        step=number, total_steps=40, epoch=number / 20, loss=2.0 / number, rate_per_s=1234.0 * number, unit="pixels",
        peak_memory_bytes=3_210_000_000, **more,
    )  # fmt: skip


def started(**more) -> Started:
    return Started(folder="/runs/a", name="a", task="t", total_steps=40, unit="pixels", **more)


def shown(events, *, terminal: bool, **settings) -> tuple[str, str]:
    """Return what is printed for good, and the bar as it stands after the last event."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=140, color_system=None, _environ={"TERM": "xterm"})
    display = TrainingDisplay(console, **settings)
    display._bar.disable = True  # drawn below, once, rather than by a thread
    for event in events:
        display.update(event)
    drawn = io.StringIO()
    Console(file=drawn, width=140, color_system=None).print(display._bar.get_renderable())
    return file.getvalue(), drawn.getvalue()


RUN = (
    started(),
    Said(text="Fused path: [all] of it."),
    Measured(step=0, epoch=0.0, values={"loss": 3.0}),
    step(1),
    step(2),
    Measured(step=2, epoch=0.1, values={"loss": 1.5, "accuracy": 0.5}),
    step(3),
    Warned(text="some modules learnt nothing (a)."),
)
LINES = (
    "Fused path: [all] of it.\n"
    "  epoch 0, step 0: validation loss 3.0000\n"
    "  epoch 0.1, step 2: validation loss 1.5000\n"
    "Warning: some modules learnt nothing (a).\n"
)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_is_a_bar_with_rate_and_lines_for_what_stays(terminal):
    lines, bar = shown(RUN, terminal=terminal)
    assert lines == LINES
    assert "training" in bar
    assert "3/40" in bar
    loss = 0.8 * (0.8 * 2.0 + 0.2 * 1.0) + 0.2 * 2 / 3
    rate = 0.8 * (0.8 * 1234 + 0.2 * 2468) + 0.2 * 3702
    assert f"loss {loss:.4f} · {rate:,.0f} pixels/s · 3.21 GB peak · validation 1.5000" in bar


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("haori.training.display.time.monotonic", lambda: now[0])
    file = io.StringIO()
    display = TrainingDisplay(Console(file=file, width=140))
    for number in range(1, 8):
        now[0] += 10.5
        display.update(step(number))
    assert [line.split(":")[0] for line in file.getvalue().splitlines()] == [
        "  step 2/40",
        "  step 4/40",
        "  step 6/40",
    ]


def test_the_bar_of_a_resumed_run_begins_where_it_stopped():
    assert "12/40" in shown([started(step=12)], terminal=True)[1]


def test_of_jobs_the_bar_names_the_one_that_trains_and_lines_alone_are_printed():
    events = [event.with_fields(job="lora-seed-1") for event in RUN]
    lines, bar = shown(events, terminal=True, between_jobs="comparing", indent="  ")
    assert lines == "  Fused path: [all] of it.\n  Warning: some modules learnt nothing (a).\n"
    assert "lora-seed-1" in bar
    assert "comparing" not in bar
    assert "3/40" in bar
    for end in (Finished(folder="/runs/a", job="x"), Failed(text="It failed.", error="E", job="x")):
        lines_after, bar = shown([*events, end], terminal=True, between_jobs="comparing", indent="  ")
        assert lines_after == lines
        assert "comparing" in bar
        assert "lora-seed-1" not in bar


def test_a_run_begins_with_no_figures_of_the_one_before():
    bar = shown([*RUN, started(job="b"), step(1, job="b")], terminal=True)[1]
    assert "loss 2.0000 · 1,234 pixels/s · 3.21 GB peak" in bar
    assert "validation" not in bar


def test_of_a_sweep_only_its_own_lines_are_printed():
    events = [Said(text="Trial 1"), *(event.with_fields(job="0001") for event in RUN)]
    lines, bar = shown(events, terminal=True, lines_of_jobs=False)
    assert lines == "Trial 1\n"
    assert "0001" in bar


def test_a_command_that_begins_many_runs_is_no_run_of_its_own():
    begun = Started(work="comparison", folder="/comparisons/a", name="a", task="t")
    assert shown([begun], terminal=True)[1].strip() == ""
