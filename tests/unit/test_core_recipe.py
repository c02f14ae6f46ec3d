import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.core.errors import RecipeError
from haori.core.methods import METHODS, LoraMethod
from haori.tasks.recipe import Recipe, load_recipe, recipe_from, recipe_schema, recipe_to_yaml

MINIMAL = {"name": "support", "base": "smollm2-135m-instruct", "data": {"path": "my.jsonl"}}


def test_minimal_recipe_leaves_the_rest_to_defaults():
    recipe = recipe_from(MINIMAL)
    assert isinstance(recipe.method, LoraMethod)
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
        ("method.kind=lorra", "'method.kind' cannot be 'lorra'; it is one of lora, dora, adalora, ard_lora, qlora"),
        ("method.kind=lorra", "did you mean 'lora'"),
        ("method.kind=7", "'method.kind' cannot be 7"),
        ("method=7", "'method' cannot be 7"),
        ("method.rnk=4", "no key 'method.rnk' for the method 'lora'; did you mean 'rank'"),
        ("method.init=zeros", "with A and B both zero both their gradients are zero"),
        ("method.init=loftq", "method.kind=qlora"),
        ("method.layers=[first]", "'method.layers.0' cannot be 'first'"),
        ("method.rank_pattern.q_proj=0", "'method.rank_pattern.q_proj' cannot be 0"),
        ("optimizer.lr=-1", "'optimizer.lr' cannot be -1"),
        ("training.epochs=true", "'training.epochs' cannot be True"),
        ("name=a b", "'name' cannot be 'a b'"),
        (
            "name=../x",
            "'name' cannot be '../x'; it should be of letters, digits, '.', '_' and '-' (at most 100, a letter",
        ),
        ("optimizer.lr", "must look like"),
        ("name.x=1", "has no keys of its own"),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence(override: str, sentence: str):
    with pytest.raises(RecipeError) as caught:
        recipe_from(MINIMAL, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not re.search(r"should be (be|Input|String|Tuple|Value|should|match|have)\b|,,|\.\.$|;;", str(caught.value))


@pytest.mark.parametrize("kind", METHODS)
def test_each_kind_has_keys_of_its_own_and_survives_yaml(kind: str):
    import yaml

    given = {"kind": kind, **({"type": "IA3"} if kind == "peft" else {})}
    recipe = recipe_from({**MINIMAL, "method": given})
    assert type(recipe.method) is METHODS[kind]
    assert recipe_from(yaml.safe_load(recipe_to_yaml(recipe))) == recipe
    with pytest.raises(RecipeError, match=f"no key 'method.nonsense' for the method '{kind}'"):
        recipe_from({**MINIMAL, "method": {**given, "nonsense": 1}})


def test_two_wrong_values_do_not_mix_what_is_allowed():
    with pytest.raises(RecipeError) as caught:
        recipe_from({**MINIMAL, "method": {"rank": 0, "dropout": 2.0}})
    assert str(caught.value) == (
        "The recipe's 'method.rank' cannot be 0; it should be 'auto'; or greater than or equal to 1."
    )


def test_a_missing_key_is_named():
    with pytest.raises(RecipeError, match=r"needs the key 'method\.type'"):
        recipe_from({**MINIMAL, "method": {"kind": "peft"}})
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
    assert {"TextSection", "CausalLmRecipe"} <= schema["$defs"].keys()
    for section in schema["$defs"].values():
        for name, field in section["properties"].items():
            assert {"description", "$ref", "oneOf"} & field.keys(), (section["title"], name)


@given(st.floats(min_value=1e-12, max_value=0.99, exclude_max=True), st.integers(1, 4096))
def test_any_allowed_number_survives_yaml(lr: float, rank: int):
    import yaml

    recipe = recipe_from(MINIMAL, [f"optimizer.lr={lr!r}", f"method.rank={rank}"])
    assert recipe.optimizer.lr == lr
    assert isinstance(recipe, Recipe)
    assert recipe_from(yaml.safe_load(recipe_to_yaml(recipe))) == recipe
