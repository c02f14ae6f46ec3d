"""Losses of single pictures: compared in pairs, with their noise, for stopping, diagnosis and plot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from haori.core.events import Measured
from haori.tasks.recipe import recipe_from
from haori.training.advice import Outcome, advise
from haori.training.diagnosis import Validation, diagnose, read_curves
from haori.training.measurements import Measurements, draw_losses
from haori.training.paired import change
from haori.training.preparation import prepare
from haori.training.session import opened_loop
from haori.training.validation import Means
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.pictures import picture_folder

HELD_OUT = np.array([0.10, 0.40, 0.90, 1.60])  # pictures differ far more than training changes them
RISES = HELD_OUT + np.array([0.010, 0.012, 0.009, 0.011])
NOISY = HELD_OUT + np.array([0.150, -0.040, -0.030, 0.020])


@pytest.mark.parametrize("things", [2, 3, 4, 7, 11, 12, 30, 200])
def test_a_change_counts_as_in_a_paired_t_test(things: int) -> None:
    random = np.random.default_rng(things)
    counted = 0
    for shift in np.linspace(-1, 1, 41):
        before = random.normal(size=things)
        after = before + shift / things**0.5 * 3 + random.normal(size=things)
        found = change(list(before), list(after))
        assert found is not None
        assert found.mean == pytest.approx((after - before).mean())
        assert found.error == pytest.approx(stats.sem(after - before))
        greater, less = (stats.ttest_rel(after, before, alternative=way).pvalue for way in ("greater", "less"))
        if min(abs(greater - 0.05), abs(less - 0.05)) > 1e-3:
            assert (found.is_rise, found.is_fall) == (greater < 0.05, less < 0.05)
            counted += found.is_rise
    assert counted > 2


def test_of_one_picture_nothing_can_be_told() -> None:
    assert change([1.0], [2.0]) is None
    assert change([], []) is None


def at(epoch: float, losses: Any, train: Any) -> Validation:
    return Validation(epoch, float(np.mean(losses)), float(np.mean(train)), tuple(losses), tuple(train))


START = at(0, HELD_OUT + 0.3, HELD_OUT + 0.31)
BEST = at(1, HELD_OUT, HELD_OUT - 0.05)


@pytest.mark.parametrize(
    ("validations", "fit"),
    [
        ([BEST, at(2, RISES, HELD_OUT - 0.1)], "over-fitting"),  # 1.4% more, on every picture
        ([BEST, at(2, NOISY, HELD_OUT - 0.1)], "levelled off"),  # 3.3% more, by one picture
        ([BEST, at(2, RISES, HELD_OUT + 0.0)], "unstable"),
        ([BEST, at(2, HELD_OUT - 0.05, HELD_OUT - 0.1)], "under-fitting"),
        ([BEST, at(2, HELD_OUT - 0.001, HELD_OUT - 0.1)], "levelled off"),  # a 300th of all it fell
        ([at(1, HELD_OUT + 0.3 + 0.05 * (NOISY - HELD_OUT), HELD_OUT)], "not carried over"),
        ([at(1, HELD_OUT + 0.299 + 0.05 * (NOISY - HELD_OUT), HELD_OUT + 0.31)], "nothing learnt"),
    ],
)
def test_the_diagnosis_weighs_changes_by_their_noise(validations: list[Validation], fit: str) -> None:
    reading = read_curves(START, validations, [1.0] * 8, 0.0)
    assert reading.fit == fit
    assert reading.rate == "fine"


def test_the_diagnosis_says_the_rise_with_its_error() -> None:
    said = diagnose(START, [BEST, at(2, RISES, HELD_OUT - 0.1)], [1.0] * 8, 0.0)
    assert "(+0.0105 ± 0.0006, paired over 4 pictures)" in said[1]
    assert "Over-fitting from epoch 1" in said[1]


def test_a_rate_that_makes_both_worse_is_too_high() -> None:
    worse = at(1, HELD_OUT + 0.31, HELD_OUT + 0.33)
    assert read_curves(START, [worse], [1.0] * 8, 0.0).rate == "too high"
    outcome = Outcome(_recipe("x", "y"), 10, 8, START.loss, [worse], [1.0] * 8, 0.0, None, "pictures", START)
    (advice,) = advise(outcome)
    assert advice.action.startswith("Lower the learning rate")


def _recipe(base: Any, data: Any, *overrides: str) -> Any:
    document = {"name": "x", "task": "text_to_image", "base": str(base), "data": {"path": str(data)}}
    return recipe_from(document, ["optimizer.lr=0.02", "training.epochs=9", *overrides])


@pytest.fixture
def loop(tmp_path: Path, haori_home: Path) -> Any:
    small: dict[str, Any] = {"block_out_channels": (8, 16), "attention_head_dim": 2}
    base = saved(stable_diffusion(**small), tmp_path / "base")
    data = picture_folder(tmp_path / "data", 8, size=(32, 32))
    recipe = _recipe(base, data, "data.resolution=32", "data.bucket_step=8", "data.validation_share=0.4",
                     "samples.prompts=[]", "training.batch_size=2", "training.dtype=fp32", "method.rank=2",
                     "training.patience=2")  # fmt: skip
    run = prepare(recipe)
    (tmp_path / "run").mkdir()
    with opened_loop(run, tmp_path / "run") as found:
        yield found


def test_each_picture_is_measured_by_itself(loop: Any) -> None:
    """Against each row run alone."""
    objective = loop.validation
    found = loop._mean_losses(objective)
    pictures = len(objective.rows)
    assert len(found.each) == pictures > 2
    loop.model.eval()
    with torch.no_grad():
        alone = [float(objective.loss(loop.model, objective.batch([row])).total) for row in range(len(objective.costs))]
    expected = np.array(alone).reshape(pictures, -1).mean(1)
    assert np.allclose(found.each, expected, rtol=1e-4)
    assert np.ptp(expected) > 0.01 * expected.mean()
    assert found.values["loss"] == pytest.approx(expected.mean(), rel=1e-4)
    loop.validate(first=True)
    (line,) = [json.loads(line) for line in (loop.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose(line["losses"], expected, rtol=1e-4)
    assert len(line["train_losses"]) == 8 - pictures  # as many as are held out, or all there are


def test_training_stops_for_rises_above_the_noise_alone(loop: Any) -> None:
    def validate(losses: Any) -> int:
        means = Means({"loss": float(np.mean(losses))}, tuple(losses))
        loop._mean_losses = lambda objective: means
        loop.position = loop.position.with_fields(step=loop.position.step + 1)
        loop.validate()
        return int(loop.position.bad_validations)

    assert validate(HELD_OUT) == 0
    assert [validate(NOISY) for _ in range(5)] == [0] * 5
    assert not loop._finished()
    assert loop.position.best_step == 1
    assert validate(RISES) == 1
    assert validate(HELD_OUT - 0.001) == 0  # a new best
    assert (validate(RISES), validate(RISES)) == (1, 2)
    assert loop._finished()
    assert loop.stopped_early


def test_training_stops_without_a_new_best_in_three_times_the_patience(loop: Any) -> None:
    def validate(losses: Any) -> bool:
        means = Means({"loss": float(np.mean(losses))}, tuple(losses))
        loop._mean_losses = lambda objective: means
        loop.position = loop.position.with_fields(step=loop.position.step + 1)
        loop.validate()
        return bool(loop._finished())

    assert not validate(HELD_OUT)
    assert [validate(NOISY) for _ in range(4)] == [False] * 4
    assert not validate(HELD_OUT - 0.001)  # a new best begins the count anew
    assert [validate(NOISY) for _ in range(6)] == [False] * 5 + [True]
    assert loop.stopped_early
    assert loop.position.bad_validations == 0


def test_the_plot_shows_what_was_measured_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    measurements = Measurements(tmp_path / "metrics.jsonl", 0)
    for step, found in enumerate([START, BEST, at(2, NOISY, HELD_OUT - 0.1)]):
        event = Measured(step=10 * step, epoch=step, values={"loss": found.loss, "train_loss": found.train_loss})
        measurements.add(event, found.losses, found.train_losses)
    draw_losses(measurements, tmp_path / "loss.png", 10, "a run", "loss")
    left, right = figures[0].axes
    assert [line.get_label() for line in left.get_lines()[:2]] == ["training pictures", "held-out pictures"]
    means = [bars.lines[0].get_ydata() for bars in right.containers]
    assert np.allclose(means[1], [0, -0.3, (NOISY - HELD_OUT - 0.3).mean()])
    low, high = right.containers[1].lines[2][0].get_segments()[2][:, 1]
    assert (high - low) / 2 == pytest.approx(stats.sem(NOISY - HELD_OUT))
