"""The range test: its judgement on curves of known shape, and a real one on a tiny base."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from haori.jobs.sweep.range_test import RangePoint, draw_range_test, judge, next_point
from tests.command_line import haori as haori_command

RATES = [1e-6 * 1e5 ** (k / 79) for k in range(80)]


def curve(middle: float, end: float) -> list[RangePoint]:
    """Return losses that fall from 4 to 2 around `middle` and rise steeply from `end` on."""
    points = []
    for rate in RATES:
        fall = 2 / (1 + math.exp(-2.5 * math.log(rate / middle)))
        loss = 4 - fall + 3 * max(0.0, math.log(rate / end))
        points.append(RangePoint(rate=rate, loss=loss, smoothed=loss))
    return points


def test_the_steepest_descent_is_found():
    found = judge(curve(1e-4, 1e-2), None)
    assert found.settled
    assert found.steepest == pytest.approx(1e-4, rel=0.3)
    assert found.suggested == pytest.approx(found.steepest, rel=0.05)


def test_the_suggestion_keeps_a_tenth_away_from_divergence():
    found = judge(curve(1e-3, 3e-3), 4e-3)
    assert found.suggested == pytest.approx(4e-4)


def test_a_loss_that_never_falls_gives_no_suggestion(tmp_path: Path):
    flat = [RangePoint(rate=rate, loss=4.0, smoothed=4.0) for rate in RATES]
    found = judge(flat, None)
    assert not found.settled
    draw_range_test(found, tmp_path / "flat.png", "flat", "loss")
    assert (tmp_path / "flat.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def recipe(tiny_base_folder: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"what is number {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "name": "numbers", "base": str(tiny_base_folder), "data": {"path": str(tmp_path / "rows.jsonl")},
        "method": {"rank": 4}, "training": {"dtype": "fp32"},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


def test_a_range_test_suggests_a_rate_that_a_recipe_takes(capsys, haori_home, recipe, tmp_path):
    out = tmp_path / "found.yaml"
    done = haori_command(capsys, "sweep", recipe, "--range-test", "--out", out)
    assert done.code == 0, done.err
    (folder,) = (haori_home / "sweeps").iterdir()
    found = json.loads((folder / "range-test.json").read_text())
    rates = [point["rate"] for point in found["points"]]
    assert rates[0] == pytest.approx(1e-6)
    ratios = {round(b / a, 6) for a, b in pairwise(rates)}
    assert len(ratios) == 1, "the rate rises by the same factor at each step"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx(rates), "the loop trained at these rates"
    assert 1e-4 < found["suggested"] < 1e-1
    assert (folder / "range-test.png").stat().st_size > 5000
    assert f"--set optimizer.lr={found['suggested']:g}" in done.out
    from haori.tasks.recipe import load_recipe

    assert load_recipe(out).optimizer.lr == found["suggested"]
    assert not (haori_home / "library").exists()


def test_the_first_loss_is_not_pulled_towards_zero_and_later_ones_are_averaged():
    points: list[RangePoint] = []
    for loss in (4.0, 4.0, 4.0, 8.0):
        points.append(next_point(points, 1e-4, loss))
    assert [point.smoothed for point in points[:3]] == pytest.approx([4.0] * 3)
    weights = [0.2 * 0.8**age for age in range(4)]
    assert points[3].smoothed == pytest.approx(4.0 + 4.0 * weights[0] / sum(weights))


def test_a_loss_that_is_no_number_ends_the_test(haori_home, recipe, monkeypatch):
    from haori.jobs.sweep import range_test as module
    from haori.tasks.recipe import load_recipe

    monkeypatch.setattr(module, "_HIGH", 1e38)  # the weights overflow
    found, _ = module.range_test(load_recipe(recipe), steps=40)
    assert found.diverged_at is not None
    assert len(found.points) < 40
    assert found.points[-1].rate < found.diverged_at
    assert all(math.isfinite(point.loss) for point in found.points)


def test_rows_that_cannot_be_trained_on_are_no_divergence(capsys, haori_home, recipe):
    """A loss that is no number at the smallest rates is an error of the run, and leaves nothing behind."""
    import torch
    from safetensors.torch import load_file, save_file

    document = json.loads(recipe.read_text())
    broken = recipe.parent / "broken"
    shutil.copytree(document["base"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("inf"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = haori_command(capsys, "sweep", recipe, "--range-test", "--set", f"base={broken}")
    assert done.code == 1
    assert "The loss became" in done.err
    assert not list((haori_home / "sweeps").iterdir())


def test_bad_use_is_a_sentence(capsys, recipe, tmp_path):
    done = haori_command(capsys, "sweep", recipe, "--range-test", "--over", "method.rank=4,8")
    assert done.code == 2
    assert "--range-test varies the learning rate alone" in done.err
