from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.core.errors import RecipeError
from haori.core.recipe import Recipe, load_recipe, recipe_from, recipe_schema, recipe_to_yaml

MINIMAL = {"name": "support", "base": "smollm2-135m-instruct", "data": {"path": "my.jsonl"}}


def test_minimal_recipe_leaves_the_rest_to_defaults():
    recipe = recipe_from(MINIMAL)
    assert recipe.method.rank == "auto"
    assert recipe.method.target == "all-linear"
    assert recipe.training.patience == 3


def test_overrides_read_scientific_numbers_lists_and_nested_keys():
    recipe = recipe_from(
        MINIMAL, ["optimizer.lr=1e-4", "method.target=[q_proj, v_proj]", "data.columns.prompt=question"]
    )
    assert recipe.optimizer.lr == 1e-4
    assert recipe.method.target == ("q_proj", "v_proj")
    assert recipe.data.columns is not None
    assert recipe.data.columns.prompt == "question"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.lrr=1", "no key 'optimizer.lrr'; did you mean 'lr'?"),
        ("metod.rank=4", "no key 'metod'; did you mean 'method'"),
        ("data.columns.promt=q", "no key 'data.columns.promt'; did you mean 'prompt'?"),
        ("method.rank=0", "'method.rank' cannot be 0; it should be 'auto'; or greater than or equal to 1"),
        ("method.rank=1.5", "'method.rank' cannot be 1.5"),
        ("method.rank=many", "'method.rank' cannot be 'many'"),
        ("method.kind=lorra", "'method.kind' cannot be 'lorra'; it should be 'lora'"),
        ("optimizer.lr=-1", "'optimizer.lr' cannot be -1"),
        ("training.epochs=true", "'training.epochs' cannot be True"),
        ("name=a b", "'name' cannot be 'a b'"),
        ("name=../x", "'name' cannot be '../x'"),
        ("optimizer.lr", "must look like"),
        ("name.x=1", "has no keys of its own"),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence(override: str, sentence: str):
    with pytest.raises(RecipeError) as caught:
        recipe_from(MINIMAL, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(RecipeError, match="needs the key 'base'"):
        recipe_from({"name": "x", "data": {"path": "y"}})


def test_yaml_round_trip(tmp_path: Path):
    recipe = recipe_from(MINIMAL, ["method.rank=4", "optimizer.lr=3e-4", "training.trackers=[mlflow]"])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"name: [", "is not valid YAML"),
        (b"name: a\nname: b", "given twice"),
        (b"- 1", "must hold a table"),
        (b"", "must hold a table"),
        (b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_a_broken_recipe_file_is_one_sentence(tmp_path: Path, content: bytes, sentence: str):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(path)


def test_a_recipe_cannot_carry_python_objects(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(path)


def test_every_field_is_documented_in_the_schema():
    schema = recipe_schema()
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        for name, field in section["properties"].items():
            assert "description" in field or "$ref" in field, (section["title"], name)


@given(st.floats(min_value=1e-12, max_value=0.99, exclude_max=True), st.integers(1, 4096))
def test_any_allowed_number_survives_yaml(lr: float, rank: int):
    import yaml

    recipe = recipe_from(MINIMAL, [f"optimizer.lr={lr!r}", f"method.rank={rank}"])
    assert recipe.optimizer.lr == lr
    assert isinstance(recipe, Recipe)
    assert recipe_from(yaml.safe_load(recipe_to_yaml(recipe))) == recipe
