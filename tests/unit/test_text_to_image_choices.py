"""What a recipe for pictures leaves open is chosen by the rules that are written down; what it gives stands."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from haori.tasks.recipe import recipe_from
from haori.tasks.text_to_image.choices import PRESETS, resolve_choices
from tests.diffusion_pipelines import saved, stable_diffusion


def resolved(
    *overrides: str,
    pictures: int = 50,
    side: int = 64,
    parameters: float = 2e7,
    flow: bool = False,
    family: str = "sd15",
) -> Any:
    recipe = recipe_from(
        {"name": "t", "task": "text_to_image", "base": "b", "data": {"path": "p"}},
        ["samples.prompts=[]", *overrides],
    )
    rows = [SimpleNamespace(bucket=(side, side), repeats=1, prior=False) for _ in range(pictures)]
    split: Any = SimpleNamespace(train=rows, validation=rows[:2])
    processor: Any = SimpleNamespace(
        family=SimpleNamespace(native_size=side, name=family),
        noising=SimpleNamespace(kind="flow" if flow else "epsilon"),
    )
    return resolve_choices(recipe, split, SimpleNamespace(parameters=parameters), processor, "cpu")  # type: ignore[arg-type]


def test_nothing_is_left_open_and_each_choice_has_its_reason():
    recipe, choices = resolved()
    assert "auto" not in {recipe.method.rank, recipe.method.alpha, recipe.optimizer.lr, recipe.training.epochs}
    assert recipe.training.budgets().step >= 5 * 64 * 64
    assert all(choice.reason for choice in choices)
    assert {choice.key for choice in choices} >= {"method.rank", "method.alpha", "optimizer.lr", "training.epochs"}


@pytest.mark.parametrize("preset", ["style", "character", "concept"])
def test_a_preset_gives_rank_and_the_effective_scale_and_what_is_given_stands(preset: str):
    recipe, choices = resolved(f"preset={preset}")
    wanted = PRESETS[preset]
    assert (recipe.method.rank, recipe.method.alpha) == (wanted.rank, wanted.alpha)
    reason = next(choice.reason for choice in choices if choice.key == "method.alpha")
    assert f"scale {wanted.alpha / wanted.rank:g}" in reason
    own, _ = resolved(f"preset={preset}", "method.rank=4", "optimizer.lr=0.5")
    assert own.method.rank == 4
    assert own.method.alpha / 4 == pytest.approx(wanted.alpha / wanted.rank)
    assert own.optimizer.lr == 0.5


def test_large_bases_and_pictures_take_small_steps_and_one_picture_at_a_time():
    recipe, _ = resolved(parameters=2.6e9, side=1024)
    assert recipe.optimizer.lr == 1e-4
    assert (recipe.training.batch_size, recipe.training.micro_batch_size) == (1, 1)
    assert recipe.training.epochs * 50 == pytest.approx(2000, rel=0.05)
    full, _ = resolved("method.kind=full", parameters=2.6e9)
    assert full.optimizer.lr == pytest.approx(1e-5)
    text, _ = resolved("training.text_encoder=true", parameters=2.6e9)
    assert text.optimizer.text_encoder_lr == pytest.approx(5e-5)


def test_flow_matching_takes_the_middle_of_the_way():
    assert resolved(flow=True)[0].noise.timesteps == "logit_normal"
    assert resolved()[0].noise.timesteps == "uniform"


def test_sdxl_has_twice_the_rank_at_the_same_alpha():
    recipe, choices = resolved("preset=style", family="sdxl", parameters=2.6e9)
    assert (recipe.method.rank, recipe.method.alpha) == (32, 16.0)
    assert "scale 0.5" in next(choice.reason for choice in choices if choice.key == "method.alpha")


def test_small_pictures_come_in_larger_batches():
    assert resolved(side=64)[0].training.batch_size == 16
    assert resolved(side=512)[0].training.batch_size == 5
    assert resolved(side=64, pictures=9)[0].training.batch_size == 3


def test_trained_tokens_are_refused_since_no_file_carries_them(tmp_path: Path):
    from haori.bases import find_base
    from haori.core.errors import RecipeError
    from haori.tasks.text_to_image import TASK

    base = find_base(str(saved(stable_diffusion(), tmp_path / "base")))
    recipe = recipe_from(
        {"name": "t", "task": "text_to_image", "base": "b", "data": {"path": "p"}}, ["method.trainable_tokens=[red]"]
    )
    with pytest.raises(RecipeError, match="no file format here carries changed tokens"):
        TASK.check(recipe, base)
