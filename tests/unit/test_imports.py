"""Importing is light, and lazily exported names are what they say."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import haori

PACKAGES = [
    f"haori.{name}" for name in ("bases", "data", "library", "training", "evaluation", "serve", "jobs", "server")
]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_exported_name_is_also_a_submodule(name: str):
    """Importing a submodule binds its name on the package, which would hide a lazily exported function."""
    package = import_module(name)
    modules = {path.stem for path in Path(package.__path__[0]).glob("*.py")}
    assert not modules & set(package.__all__)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_exported_name_exists(name: str):
    package = import_module(name)
    for exported in package.__all__:
        assert not isinstance(getattr(package, exported), ModuleType)
    with pytest.raises(AttributeError):
        _ = package.no_such_name


@pytest.mark.parametrize(
    "name",
    [
        "haori",
        "haori.tasks.recipe",
        "haori.tasks.task",
        "haori.core.records",
        "haori.metrics.kinds",
        "haori.cli.app",
        *PACKAGES,
    ],
)
def test_importing_loads_nothing_heavy(name: str):
    heavy = "torch,transformers,peft,datasets,numpy,pandas,matplotlib,sklearn,sqlalchemy,accelerate,fastapi"
    code = f"import sys, {name}; sys.exit(','.join(m for m in '{heavy}'.split(',') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_train_and_evaluate_are_functions_whatever_was_imported_before():
    from haori.core.errors import InputError

    import_module("haori.training")
    import_module("haori.evaluation")
    with pytest.raises(InputError, match="Give a recipe"):
        haori.train()
    with pytest.raises(haori.HaoriError):
        haori.evaluate("no-such-adapter", "no-such-file.jsonl")
