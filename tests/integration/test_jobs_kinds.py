"""Comparing, searching and drawing as jobs of the queue, in processes of their own."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from haori.core.errors import InputError
from haori.core.events import discard
from haori.jobs import Comparison
from haori.jobs.database.connection import open_database
from haori.jobs.queue.attempt import Pace
from haori.jobs.queue.kinds.pictures import generate
from haori.jobs.queue.launching.local import LocalLauncher
from haori.jobs.queue.records import Requirements
from haori.jobs.queue.store import JobStore
from haori.jobs.queue.worker import Worker
from haori.library import Library
from haori.tasks.recipe import load_recipe
from tests.diffusion_pipelines import saved, stable_diffusion


@pytest.fixture
def store(haori_home: Path):
    database = open_database()
    yield JobStore(database)
    database.close()


def work(store: JobStore) -> None:
    pace = Pace(lease_s=20, heartbeat_s=0.5, poll_s=0.02, grace_s=5)
    Worker(store, "w", LocalLauncher(), Requirements(device="cpu"), pace).run(lambda: False, until_empty=True)


def ended(store: JobStore, job_id: str):
    job = store.find(job_id)
    assert job.state == "succeeded", job.error
    return job


@pytest.fixture
def recipe(tiny_base_folder: Path, tmp_path: Path):
    rows = [{"prompt": f"what is number {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "numbers", "base": str(tiny_base_folder), "data": {"path": str(tmp_path / "rows.jsonl")},
        "method": {"kind": "lora", "rank": 2}, "training": {"dtype": "fp32", "epochs": 1, "max_steps": 2},
    }  # fmt: skip


def test_pictures_are_drawn_and_those_that_are_there_are_kept(store: JobStore, tmp_path: Path):
    base = saved(stable_diffusion(), tmp_path / "painter")
    spec = {"base": str(base), "prompts": ["a cat", "a red cat"], "steps": 2, "width": 32, "height": 32, "seed": 5,
            "count": 2}  # fmt: skip
    drawn = store.submit("generate", spec)
    work(store)
    result = ended(store, drawn.id).result
    assert result["pictures"] == [f"{prompt:05d}-{n:03d}-{5 + n}.png" for prompt in (0, 1) for n in (0, 1)]
    place = Path(result["folder"])
    pictures = []
    for name in result["pictures"]:
        with Image.open(place / name) as picture:
            assert picture.size == (32, 32)
            pictures.append(picture.tobytes())
    assert len(set(pictures)) == 4
    shutil.rmtree(base)  # another attempt needs it no more
    assert generate(spec, place.parent, discard) == result
    with pytest.raises(InputError, match="stepps"):
        generate({**spec, "stepps": 2}, tmp_path, discard)


@pytest.mark.slow  # each run of a comparison and each trial of a sweep is a process that imports everything
def test_methods_are_compared_and_keys_searched(store: JobStore, recipe):
    compared = store.submit("compare", {"recipe": recipe, "methods": ["lora"], "seeds": 1})
    swept = store.submit("sweep", {"recipe": recipe, "over": ["lora.rank=2,4"], "trials": 2})
    work(store)
    found = ended(store, compared.id).result
    comparison = Comparison.model_validate_json((Path(found["folder"]) / "comparison.json").read_bytes())
    assert [method.method for method in comparison.methods] == ["base", "lora"]
    assert found["failed"] == [] and Path(found["report"]).is_file()
    result = ended(store, swept.id).result
    assert result["trials"] == 2 and result["best"]["method.rank"] in ("2", "4")
    assert load_recipe(Path(result["recipe"])).method.rank == int(result["best"]["method.rank"])
    assert list(Library().list()) == []  # nothing of either is in the user's library
