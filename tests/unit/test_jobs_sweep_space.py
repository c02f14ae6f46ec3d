"""What a sweep may vary: every range is read as meant, and every misuse is a sentence that helps."""

import pytest

from haori.core.errors import RecipeError
from haori.jobs.sweep.space import Choices, Numbers, grid, overrides_of, parse_space, size
from haori.tasks.recipe import recipe_from

RECIPE = {"name": "a", "base": "b", "data": {"path": "p"}}


@pytest.mark.parametrize(
    ("item", "meant", "count"),
    [
        ("method.rank=4,8,16", Choices("method.rank", ("4", "8", "16")), 3),
        ("lora.rank=4, 8", Choices("method.rank", ("4", "8")), 2),
        ("method.target=all-linear,[q_proj,v_proj]", Choices("method.target", ("all-linear", "[q_proj,v_proj]")), 2),
        ("optimizer.lr=1e-4,auto", Choices("optimizer.lr", ("1e-4", "auto")), 2),
        ("optimizer.lr=log:1e-5:1e-3", Numbers("optimizer.lr", "log", 1e-5, 1e-3), None),
        ("method.dropout=lin:0:0.2", Numbers("method.dropout", "lin", 0.0, 0.2), None),
        ("training.epochs=int:1:5", Numbers("training.epochs", "int", 1.0, 5.0), 5),
    ],
)
def test_ranges_are_read(item, meant, count):
    (found,) = parse_space([item], RECIPE)
    assert found == meant
    assert size([found]) == count


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([], "at least one key"),
        (["method.rank"], "is no range"),
        (["method.rank="], "is no range"),
        (["method.rnk=4,8"], "no key 'method.rnk' for the method 'lora'; did you mean 'rank'"),
        (["dora.rank=4,8"], "recipe's method is 'lora'"),
        (["method.rank=4,x"], "'method.rank' cannot be 'x'"),
        (["method.rank=0,4"], "cannot be 0"),
        (["method.rank=4,,8"], "A value is missing"),
        (["method.rank=4,8,4"], "gives the value '4' twice"),
        (["method.rank=4,8", "lora.rank=16,32"], "varied twice"),
        (["method.rank=lin:4:8"], "write method.rank=int:low:high"),
        (["training.epochs=int:0:3"], "cannot be 0"),
        (["training.epochs=int:1:2.5"], "from one whole number to another"),
        (["optimizer.lr=log:1e-3:1e-5"], "from a lower to a higher"),
        (["optimizer.lr=log:0:1e-3"], "must begin above 0"),
        (["optimizer.lr=log:1e-3"], "needs two numbers"),
        (["optimizer.lr=log:a:b"], "needs two numbers"),
        (["optimizer.lr=log:1e-4:inf"], "from a lower to a higher"),
        (["optimizer.lr=log:1e-4:2"], "cannot be 2.0"),
        (["data.max_length=64,128"], "another data cannot be compared"),
        (["name=a,b"], "another name cannot be compared"),
        (["method.kind=lora,dora", "method.init=default,pissa"], "no key 'method.init' for the method 'dora'"),
    ],
)
def test_misuse_is_a_sentence(items, said):
    with pytest.raises(RecipeError) as caught:
        parse_space(items, RECIPE)
    assert said in str(caught.value)


def test_a_grid_holds_every_combination_once_and_its_values_make_recipes():
    space = parse_space(["method.rank=4,8", "training.epochs=int:1:3"], RECIPE)
    points = list(grid(space))
    assert len(points) == size(space) == 6
    assert len({tuple(point.items()) for point in points}) == 6
    recipes = [recipe_from(RECIPE, overrides_of(point)) for point in points]
    assert {(made.method.rank, made.training.epochs) for made in recipes} == {(r, e) for r in (4, 8) for e in (1, 2, 3)}


def test_floats_survive_the_way_into_a_recipe():
    assert recipe_from(RECIPE, overrides_of({"optimizer.lr": 3.217e-5})).optimizer.lr == 3.217e-5
