"""What Haori 0.1.0 wrote to disk is opened, proved and continued today. The fixtures are never made again."""

import shutil
from pathlib import Path

import pytest

from haori.core.recipe import load_recipe
from haori.core.records import BaseReference, DataReference, RunRecord, Verification
from haori.library import Library, inspect_adapter, verify_stored

FIXTURES = Path(__file__).parents[1] / "fixtures" / "0.1.0"
NAMES = ["adalora@1", "also@1", "ard-lora@1", "dora@1", "loha@1", "lora@1", "lora@2", "qlora@1"]


@pytest.fixture
def kept(tmp_path: Path, haori_home: Path) -> Path:
    """A copy of the fixtures whose library and runs are those of this machine."""
    shutil.copytree(FIXTURES, tmp_path / "0.1.0")
    shutil.copytree(FIXTURES / "home", haori_home)
    return tmp_path / "0.1.0"


def test_a_library_is_read_as_it_was_left(kept: Path):
    library = Library()
    assert [stored.name for stored in library.list()] == NAMES
    assert library.get("lora").name == "lora@1"  # promoted, with a newer one there
    card = library.get("lora").card
    assert card.verification is not None and card.verification.passed
    assert card.run is not None and card.run.steps == 6
    assert [round(e.metrics["accuracy"].value, 2) for e in card.evaluations] == [0.5]
    found = [stored.name for stored in library.search("cc-by lora")]
    assert found == ["adalora@1", "ard-lora@1", "lora@1", "qlora@1"]


def test_the_index_is_made_again_from_the_cards(kept: Path):
    library = Library()
    (library.root / "index.sqlite").unlink()
    assert [stored.name for stored in library.list()] == NAMES
    rebuilt = library.rebuild()
    assert (rebuilt.adapters, rebuilt.problems) == (7, ())


@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_passes_its_proof(kept: Path, name: str):
    found = verify_stored(Library(), name, base_spec=str(kept / "base"))
    assert found.passed, found.failures
    assert Library().get(name).card.verification == found


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read(path: Path):
    recipe = load_recipe(path)
    assert (recipe.name, recipe.optimizer.lr, recipe.training.epochs) == (path.stem, 0.01, 2)
    assert recipe.data.system == "be short"


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("home/runs/*")), ids=lambda path: path.name)
def test_run_folders_are_read(path: Path):
    record = RunRecord.model_validate_json((path / "run.json").read_bytes())
    assert record.status == ("stopped" if record.name == "stopped" else "finished")
    assert load_recipe(path / "recipe.yaml").name == record.name
    BaseReference.model_validate_json((path / "base.json").read_bytes())
    assert DataReference.model_validate_json((path / "data.json").read_bytes()).licence in {"CC-BY-4.0", None}
    if (path / "verification.json").exists():
        assert Verification.model_validate_json((path / "verification.json").read_bytes()).passed
    if record.adapter is not None:
        inspect_adapter(path / "adapter")


def test_a_stopped_run_goes_on(kept: Path, haori_home: Path, monkeypatch: pytest.MonkeyPatch):
    import haori

    monkeypatch.chdir(kept)
    (folder,) = haori_home.glob("runs/stopped-*")
    done = haori.resume(folder, progress=False)
    assert done.adapter is not None and done.adapter.name == "stopped@1"
    assert done.record.steps == 6
