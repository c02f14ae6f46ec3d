"""What a sweep shows: order, remarks, winner and plot, from outcomes made for it."""

from pathlib import Path

import pytest
from rich.console import Console

from haori.core.records import now
from haori.jobs.sweep.search import SweepPlan, SweepResult
from haori.jobs.sweep.show import draw_sweep, remarks, trial_table, write_winner
from haori.jobs.sweep.study import SweepTrial
from haori.jobs.sweep.trial import TrialOutcome
from haori.tasks.recipe import load_recipe, recipe_from, recipe_to_yaml

RECIPE = {"name": "a", "base": "b", "data": {"path": "p"}}
OVER = ("method.rank=4,8,16", "optimizer.lr=log:1e-5:1e-3")


def trial(number: int, rank: str, lr: float, state: str, loss: float | None, **more: object) -> SweepTrial:
    outcome = TrialOutcome.model_validate({"state": state, "loss": loss, "best_epoch": 2, "seconds": 9.0, **more})
    return SweepTrial(number=number, values={"method.rank": rank, "optimizer.lr": lr}, outcome=outcome)


def result(folder: Path, *trials: SweepTrial, **method: float) -> SweepResult:
    recipe = {**RECIPE, "method": dict(method)} if method else RECIPE
    plan = SweepPlan(recipe=recipe, over=OVER, trials=6, started=now())
    return SweepResult(folder=folder, plan=plan, trials=trials, wanted=6)


@pytest.fixture
def usual(tmp_path: Path) -> SweepResult:
    run = tmp_path / "run"
    run.mkdir()
    made = recipe_from(RECIPE, ["method.rank=8", "method.alpha=16", "optimizer.lr=1.2e-4"])
    (run / "recipe.yaml").write_text(recipe_to_yaml(made))
    return result(
        tmp_path,
        trial(2, "8", 1.2e-4, "finished", 1.5, run=str(run)),
        trial(0, "4", 2e-4, "finished", 1.6),
        trial(1, "16", 4e-5, "finished", 1.7),
        trial(5, "16", 1e-3, "finished", 9.0),
        trial(3, "4", 1.1e-5, "pruned", 1.9),
        trial(4, "16", 9e-4, "failed", None, error="The loss became nan."),
    )


def test_the_table_has_the_best_first_and_says_how_each_ended(usual):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(trial_table(usual))
    lines = [line.split("│")[1:-1] for line in capture.get().splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert [row[0] for row in cells] == ["2", "0", "1", "5", "3", "4"]
    assert cells[0] == ["2", "8", "0.00012", "1.5000", "2", "9 s", "best"]
    assert [row[-1] for row in cells[1:]] == ["finished"] * 3 + ["given up", "The loss became nan."]


def test_a_list_as_a_value_is_shown_with_its_brackets(tmp_path):
    outcome = TrialOutcome(state="failed", error="cannot be [1, 2]")
    one = SweepTrial(number=0, values={"method.target": "[q_proj,v_proj]"}, outcome=outcome)
    plan = SweepPlan(recipe=RECIPE, over=("method.target=all-linear,[q_proj,v_proj]",), trials=2, started=now())
    console = Console(width=160)
    with console.capture() as capture:
        console.print(trial_table(SweepResult(folder=tmp_path, plan=plan, trials=(one,), wanted=2)))
    assert "[q_proj,v_proj]" in capture.get()
    assert "cannot be [1, 2]" in capture.get()


def test_the_winner_is_a_recipe_with_its_figures_on_top(usual, tmp_path):
    path = tmp_path / "winner.yaml"
    write_winner(usual, path)
    assert load_recipe(path).optimizer.lr == 1.2e-4
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert head == [
        "# The best of 6 trials of a sweep over method.rank=4,8,16 optimizer.lr=log:1e-5:1e-3",
        "# Validation loss 1.5000 nats per trained token at epoch 2",
        "# Trial 2: method.rank=8, optimizer.lr=0.00012",
    ]


def test_a_clear_result_inside_its_ranges_needs_no_remark(usual):
    assert remarks(usual) == []


def test_remarks_name_edges_close_runners_up_and_a_scale_that_changed(tmp_path):
    made = result(
        tmp_path, trial(0, "16", 9e-4, "finished", 1.5), trial(1, "8", 1e-4, "finished", 1.51), rank=8, alpha=16.0
    )
    close, rank, rate, scale = remarks(made)
    assert "1 other trial is within 1%" in close
    assert "method.rank, 16, lies at the upper end" in rank
    assert "optimizer.lr, 0.0009, lies at the upper end" in rate
    assert "method.alpha was 16 at every rank" in scale
    low = remarks(result(tmp_path, trial(0, "8", 1.1e-5, "finished", 1.5)))
    assert low == ["The best optimizer.lr, 1.1e-05, lies at the lower end of what was tried; look further that way."]


def test_one_bad_trial_does_not_flatten_the_plot(usual, tmp_path):
    path = tmp_path / "sweep.png"
    draw_sweep(usual, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    from haori.jobs.sweep.show import _top

    top = _top([t.outcome.loss for t in usual.trials if t.outcome.loss is not None])
    assert 1.9 < top < 9.0
