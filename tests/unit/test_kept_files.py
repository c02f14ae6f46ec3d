"""What Haori 0.1.0 wrote to disk is opened, proved and continued today. The fixtures are never made again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from haori.core.errors import LibraryError, RecipeError
from haori.core.records import AdapterCard, BaseReference, DataReference, RunRecord, Verification
from haori.library import Library, inspect_adapter, verify_stored
from haori.library.cards import read_card
from haori.tasks import recipe_history
from haori.tasks.recipe import kept_recipe, load_recipe, recipe_from, recipe_to_yaml

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
    found = sorted(listed.entry.full_name for listed in library.search("cc-by lora").listed)
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
    kept = json.loads((path / "run.json").read_bytes())
    written = json.loads(record.model_dump_json())
    assert record.cost == written["tokens"] == kept["tokens"] > 0 and "cost" not in written
    assert load_recipe(path / "recipe.yaml").name == record.name
    BaseReference.model_validate_json((path / "base.json").read_bytes())
    assert DataReference.model_validate_json((path / "data.json").read_bytes()).licence in {"CC-BY-4.0", None}
    if (path / "verification.json").exists():
        assert Verification.model_validate_json((path / "verification.json").read_bytes()).passed
    if record.adapter is not None:
        inspect_adapter(path / "adapter")


def test_a_recipe_that_is_not_known_any_more_hides_no_adapter(kept: Path, monkeypatch: pytest.MonkeyPatch):
    library = Library()
    (path,) = (p for p in library.root.glob("adapters/*/*/card.json") if '"lora@1"' in p.read_text())
    # As if `optimizer.lr` had been called so, and a section of its own had been taken out, since.
    text = path.read_text().replace('"lr": 0.01', '"rate": 0.01').replace('"schedule": {', '"plan": {')
    path.write_text(text)
    assert library.rebuild() == (7, ())
    stored = library.get("lora")
    assert [found.name for found in library.list()] == NAMES and stored.card.system == "be short"
    assert verify_stored(library, "lora", base_spec=str(kept / "base")).passed
    changed = library.update("lora", description="changed").card
    assert changed.recipe_data == json.loads(text)["recipe"]
    with pytest.raises(RecipeError, match=r"kept with the adapter 'lora@1'.*no key 'optimizer.rate'"):
        kept_recipe(stored.card)

    def rename(document: dict[str, Any]) -> dict[str, Any]:
        document["schedule"] = document.pop("plan", document.get("schedule", {}))
        optimizer = document.get("optimizer", {})
        return {**document, "optimizer": {"lr" if key == "rate" else key: value for key, value in optimizer.items()}}

    monkeypatch.setattr(recipe_history, "RECIPE_SCHEMA", 2)
    monkeypatch.setattr(recipe_history, "_MIGRATIONS", {1: rename})
    migrated = recipe_history.migrate_recipe(stored.card.recipe_data or {})
    assert migrated["schema_version"] == 2 and migrated["optimizer"]["lr"] == 0.01
    assert migrated == recipe_history.migrate_recipe(migrated)
    monkeypatch.setattr(recipe_history, "RECIPE_SCHEMA", 1)
    recipe = recipe_from({**migrated, "schema_version": 1})
    assert (recipe.optimizer.lr, recipe.schedule.kind, recipe.training.epochs) == (0.01, "linear", 2)


def test_what_a_newer_version_wrote_says_so(kept: Path):
    with pytest.raises(RecipeError, match=r"cannot be 2.*upgrade Haori"):
        recipe_from({"schema_version": 2, "name": "a", "base": "b", "data": {"path": "c"}})
    library = Library()
    path = library.get("lora").path / "card.json"
    for change in ({"schema_version": 2}, {"invented_later": 1}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(LibraryError, match="newer Haori"):
            read_card(path.parent)


def test_what_is_written_today_says_its_version(tmp_path: Path):
    recipe = load_recipe(FIXTURES / "recipes" / "lora.yaml")
    assert "schema_version" not in (FIXTURES / "recipes" / "lora.yaml").read_text()
    text = recipe_to_yaml(recipe)
    assert text.startswith(f"schema_version: {recipe_history.RECIPE_SCHEMA}\n")
    (tmp_path / "again.yaml").write_text(text)
    assert load_recipe(tmp_path / "again.yaml") == recipe
    base = BaseReference.model_validate_json(next(FIXTURES.glob("home/runs/lora-*/base.json")).read_bytes())
    card = AdapterCard(id="", origin="trained", created="now", base=base, method="lora", recipe=recipe)
    assert kept_recipe(card) == recipe
    assert json.loads(card.model_dump_json())["recipe"]["schema_version"] == recipe_history.RECIPE_SCHEMA


def test_a_stopped_run_goes_on(kept: Path, haori_home: Path, monkeypatch: pytest.MonkeyPatch):
    import haori

    monkeypatch.chdir(kept)
    (folder,) = haori_home.glob("runs/stopped-*")
    done = haori.resume(folder, progress=False)
    assert done.adapter is not None and done.adapter.name == "stopped@1"
    assert done.record.steps == 6
