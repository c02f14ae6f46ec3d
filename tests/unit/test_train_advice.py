"""Advice after a run: each case from curves made for it, and from a real run that learns its rows by heart."""

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import haori
from haori.core.records import Advice, RunRecord
from haori.tasks.recipe import load_recipe, recipe_from
from haori.training.advice import Outcome, advise
from haori.training.diagnosis import Validation, diagnose
from haori.training.spectrum import Spectrum, singular_values, spectrum_of
from tests.command_line import haori as haori_command

RESOLVED = [
    "method.rank=8", "method.alpha=16", "optimizer.lr=5e-4", "training.epochs=4",
]  # fmt: skip


def outcome(
    validations: list[tuple[float, float, float]], steps: tuple[float, float] = (2.0, 0.5), *, clipped: float = 0.1,
    overrides: tuple[str, ...] = (), spectrum: Spectrum | None = None, done: int = 40,
) -> Outcome:  # fmt: skip
    recipe = recipe_from({"name": "a", "base": "b", "data": {"path": "my data.jsonl"}}, [*RESOLVED, *overrides])
    losses = [steps[0] + (steps[1] - steps[0]) * i / (done - 1) for i in range(done)]
    return Outcome(recipe, 120, done, 2.0, [Validation(*v) for v in validations], losses, clipped, spectrum)


def changes(advice: tuple[Advice, ...]) -> list[dict[str, Any]]:
    return [one.changes for one in advice]


OVER = [(1.0, 1.2, 1.3), (2.0, 0.9, 0.7), (3.0, 1.2, 0.3), (4.0, 1.5, 0.1)]
UNDER = [(1.0, 1.7, 1.9), (2.0, 1.5, 1.6), (3.0, 1.35, 1.4), (4.0, 1.2, 1.2)]
LEVEL = [(1.0, 1.1, 1.3), (2.0, 1.0, 1.0), (3.0, 0.99, 0.95), (4.0, 0.985, 0.9)]


def test_over_fitting_asks_for_fewer_epochs_dropout_and_rows():
    advice = advise(outcome(OVER))
    assert changes(advice) == [{"training.epochs": 2}, {"method.dropout": 0.05}, {}]
    assert "lowest at epoch 2 (0.900) and 1.500 at epoch 4" in advice[0].reason
    assert "0.100 on training rows and 1.500 on rows held out" in advice[1].reason
    assert "Add rows, say 120 more" in advice[2].action
    assert advice[2].command is None


def test_over_fitting_with_dropout_doubles_it_and_a_method_without_one_is_not_told_to():
    assert {"method.dropout": 0.1} in changes(advise(outcome(OVER, overrides=("method.dropout=0.05",))))
    recipe = recipe_from(
        {"name": "a", "base": "b", "data": {"path": "p"}, "method": {"kind": "full"}},
        ["optimizer.lr=5e-5", "training.epochs=4"],
    )
    assert changes(advise(outcome(OVER)._replace(recipe=recipe))) == [{"training.epochs": 2}, {}]


def test_under_fitting_asks_for_more_epochs_or_a_larger_rate():
    assert changes(advise(outcome(UNDER))) == [{"training.epochs": 8}, {"optimizer.lr": 0.001}]
    assert changes(advise(outcome(UNDER, clipped=0.8))) == [{"training.epochs": 8}], "steps are cut already"


def test_under_fitting_under_a_limit_of_steps_raises_the_limit():
    (advice, _) = advise(outcome(UNDER, overrides=("training.max_steps=40", "training.epochs=9")))
    assert advice.changes == {"training.max_steps": 80, "training.epochs": 9}


@pytest.mark.parametrize(
    ("validations", "steps", "clipped", "lr"),
    [
        ([(1.0, 2.6, 3.0), (2.0, 2.9, 3.5)], (2.0, 4.0), 0.9, 0.00017),
        ([(1.0, 1.9, 2.0), (2.0, 1.89, 1.95)], (2.0, 1.95), 0.95, 0.00025),
        ([(1.0, 1.0, 1.1), (2.0, 1.4, 1.2)], (2.0, 1.2), 0.2, 0.00025),
    ],
)
def test_a_rate_that_is_too_high_is_put_right_before_anything_else(validations, steps, clipped, lr):
    assert changes(advise(outcome(validations, steps, clipped=clipped))) == [{"optimizer.lr": lr}]


def test_nothing_learnt_asks_for_a_larger_rate_and_a_look_at_the_data():
    advice = advise(outcome([(1.0, 1.995, 2.0), (2.0, 1.99, 2.0)], (2.0, 1.99), clipped=0.0))
    assert advice[0].changes == {"optimizer.lr": 0.0015}
    assert shlex.split(advice[1].command or "") == [
        "haori",
        "data",
        "check",
        "my data.jsonl",
        "--base",
        "b",
        "--show",
        "3",
    ]


def test_what_does_not_carry_over_is_no_matter_of_the_rate():
    advice = advise(outcome([(1.0, 1.98, 1.6), (2.0, 1.99, 1.2), (3.0, 1.985, 1.0)], (1.8, 1.0)))
    assert [one.action for one in advice] == ["Look at what is trained on", "Add rows, say 120 more"]


def test_without_validation_rows_are_to_be_held_out():
    assert changes(advise(outcome([]))) == [{"data.validation_share": 0.1}]


def test_rank_follows_the_spectrum_and_keeps_the_scale():
    concentrated, flat, usual = Spectrum(8, 14, 0.99), Spectrum(8, 14, 0.6), Spectrum(8, 14, 0.9)
    lower = advise(outcome(LEVEL, spectrum=concentrated))
    assert {"method.rank": 4, "method.alpha": 8.0} in changes(lower)
    assert any("largest 4 of 8 singular values" in one.reason and "99.0%" in one.reason for one in lower)
    higher = changes(advise(outcome(UNDER, spectrum=flat)))
    assert {"method.rank": 16, "method.alpha": 32.0} in higher
    rslora = changes(advise(outcome(LEVEL, spectrum=concentrated, overrides=("method.rslora=true",))))
    assert {"method.rank": 4, "method.alpha": pytest.approx(16 / math.sqrt(2), rel=1e-3)} in rslora
    for judged in (outcome(LEVEL, spectrum=usual), outcome(OVER, spectrum=flat), outcome(LEVEL),
                   outcome(LEVEL, spectrum=Spectrum(16, 14, 0.99))):  # fmt: skip
        assert not any("method.rank" in one for one in changes(advise(judged)))


def test_a_run_that_went_well_is_told_where_to_search():
    (search,) = advise(outcome(LEVEL))
    words = shlex.split(search.command or "")
    assert words[:3] == ["haori", "sweep", "RUN/recipe.yaml"]
    from haori.jobs.sweep.space import parse_space

    parse_space([words[4]], {"name": "a", "base": "b", "data": {"path": "p"}})


@pytest.mark.parametrize("curves", [OVER, UNDER, LEVEL, []])
def test_every_change_makes_a_recipe_and_is_what_the_command_sets(curves, tmp_path: Path):
    from haori.tasks.recipe import recipe_to_yaml

    run = tmp_path / "a run"
    run.mkdir()
    given = outcome(curves, spectrum=Spectrum(8, 14, 0.99))
    (run / "recipe.yaml").write_text(recipe_to_yaml(given.recipe))
    for one in advise(given):
        if not one.changes:
            continue
        words = shlex.split(one.command_in(run) or "")
        assert words[:3] == ["haori", "train", str(run / "recipe.yaml")]
        assert set(words[3::2]) == {"--set"}
        changed = load_recipe(Path(words[2]), words[4::2]).model_dump()
        for key, value in one.changes.items():
            section, _, name = key.partition(".")
            assert changed[section][name] == value


def test_an_unstable_run_is_called_so():
    said = diagnose(2.0, [Validation(1, 1.0, 1.1), Validation(2, 1.4, 1.2)], [2.0, 1.5, 1.2, 1.2], 0.1)
    assert any("Unstable from epoch 1" in sentence for sentence in said)
    assert not any("levelled off" in sentence for sentence in said)


def test_singular_values_are_those_of_the_product():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 10, generator=generator), torch.randn(7, 4, generator=generator)
    expected = torch.linalg.svdvals((b @ a).double())[:4]
    torch.testing.assert_close(singular_values(a, b), expected, rtol=1e-6, atol=1e-6)


def test_the_spectrum_of_a_saved_adapter(tmp_path: Path):
    orthogonal = torch.linalg.qr(torch.randn(8, 4, generator=torch.Generator().manual_seed(0))).Q
    sizes = torch.diag(torch.tensor([3.0, 4.0, 0.0, 5.0]))
    tensors = {"m.q.lora_A.weight": sizes @ orthogonal.T, "m.q.lora_B.weight": orthogonal.contiguous()}
    tensors |= {"m.v.lora_A.weight": orthogonal.T.contiguous(), "m.v.lora_B.weight": torch.zeros(8, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = spectrum_of(tmp_path)
    assert found is not None
    assert (found.rank, found.modules) == (4, 1), "a module without an update says nothing"
    assert found.top_half == pytest.approx((16 + 25) / 50)
    assert spectrum_of(tmp_path / "absent") is None


def sharper(base: Path, folder: Path) -> Path:
    """Return a copy of a tiny base with eight times larger logits, so that it can be sure of an answer."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_run_that_learns_its_rows_by_heart_is_advised_so(capsys, haori_home, tiny_base_folder, tmp_path):
    for name, answer, numbers in (("rows", "it is odd", range(12)), ("held", "it was even", range(12, 18))):
        rows = [{"prompt": f"what is number {i}?", "completion": answer} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = haori_command(
        capsys, "train", "--base", sharper(tiny_base_folder, tmp_path / "sharp"), "--data", tmp_path / "rows.jsonl",
        "--name", "heart", "--set", f"data.validation={tmp_path / 'held.jsonl'}", "--set", "training.epochs=8",
        "--set", "training.patience=8", "--set", "optimizer.lr=5e-3", "--set", "training.dtype=fp32",
    )  # fmt: skip
    assert done.code == 0, done.err
    (run,) = (haori_home / "runs").iterdir()
    record = RunRecord.model_validate_json((run / "run.json").read_bytes())
    assert any("Over-fitting" in sentence for sentence in record.diagnosis), record.diagnosis
    best = record.advice[0].changes["training.epochs"]
    assert isinstance(best, int)
    assert best == record.best_epoch
    assert {"method.dropout": 0.05} in changes(record.advice)
    assert f"haori train {run / 'recipe.yaml'} --set training.epochs={best}" in done.out
    assert load_recipe(run / "recipe.yaml", [f"training.epochs={best}"]).training.epochs == best
    assert haori.Library().get("heart").card.run.advice == record.advice


def test_rows_held_out_that_fare_better_than_training_rows_are_no_over_fitting():
    from haori.training.diagnosis import Validation, read_curves

    validations = [Validation(0.75, 0.036, 0.141), Validation(1.0, 0.039, 0.074)]
    assert read_curves(2.356, validations, [1.0] * 8 + [0.1] * 8, 0.0).fit == "levelled off"
