"""Sample pictures while training: drawn from the live adapter, on a sheet that grows, leaving no trace in training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from haori.api import train
from haori.tasks.text_to_image.sheet import SheetRow, draw_sheet
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.pictures import picture_folder

PROMPTS = '["a red cat", "red"]'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two runs of the same recipe, one with samples and one without."""
    from haori.core.settings import settings

    root = tmp_path_factory.mktemp("runs")
    base = saved(stable_diffusion(), root / "base")
    data = picture_folder(root / "data", 12, size=(32, 32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(root / "home"))
        settings.cache_clear()
        found = {
            name: train(
                base=str(base), data=str(data), name=name, progress=False,
                overrides=[
                    "training.epochs=4", "training.evaluations_per_epoch=1", "training.batch_size=4", "samples.steps=2",
                    "samples.sheets=2", f"samples.prompts={prompts}", "optimizer.lr=0.01", "training.dtype=fp32",
                ],
            )
            for name, prompts in (("drawn", PROMPTS), ("plain", "[]"))
        }  # fmt: skip
    settings.cache_clear()
    return found


def test_samples_leave_no_trace_in_the_training(runs: Any):
    one, other = (load_file(runs[name].folder / "adapter" / "adapter_model.safetensors") for name in ("drawn", "plain"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (runs["plain"].folder / "samples.png").exists()


def test_the_base_comes_first_and_what_is_drawn_shows_the_adapter(runs: Any):
    folder = runs["drawn"].folder / "samples"
    steps = sorted({path.name.split("-epoch")[0] for path in folder.iterdir()})
    assert [int(step.removeprefix("step-")) for step in steps] == [0, 6, 12]
    assert len(list(folder.iterdir())) == 6
    by_step = [np.asarray(Image.open(next(folder.glob(f"{step}*-0.png"))), dtype=float) for step in steps]
    assert np.abs(by_step[1] - by_step[0]).mean() > 1  # of 255
    assert np.abs(by_step[2] - by_step[1]).mean() > 0.3


def test_a_sample_is_what_the_stock_pipeline_draws_with_the_saved_adapter(runs: Any, tmp_path: Path):
    """The last row of the sheet against diffusers with PEFT's own files; the bare base must not pass for it."""
    from diffusers import StableDiffusionPipeline
    from peft import PeftModel

    run = runs["drawn"]
    base = Path(run.adapter.card.base.source.removeprefix("folder:"))
    plain = StableDiffusionPipeline.from_pretrained(base)
    before = drawn(plain)
    from haori.bases import find_base
    from haori.bases.diffusion import load_diffusion_model

    model = load_diffusion_model(find_base(str(base)), dtype="fp32", device="cpu", components=("unet",))
    adapted = PeftModel.from_pretrained(model, run.folder / "adapter")
    best = run.record.best_step
    plain.unet = adapted.get_base_model().unet
    after = drawn(plain)
    file = next((run.folder / "samples").glob(f"step-{best:08d}-*-0.png"), None)
    assert file is not None, f"the best step {best} was not drawn"
    shown = np.asarray(Image.open(file), dtype=float)
    assert np.abs(shown - after).max() <= 2
    assert np.abs(shown - before).mean() > 1


def drawn(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red cat", width=32, height=32, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    ).images[0]
    return np.asarray(image, dtype=float)


def test_a_sheet_holds_every_picture_where_it_belongs():
    colours = [["red", "green"], ["blue", "yellow"]]
    rows = [SheetRow(f"row {n}", [Image.new("RGB", (32, 32), c) for c in row]) for n, row in enumerate(colours)]
    sheet = np.asarray(draw_sheet(rows, ["one", "two"]))
    places = []
    for row in colours:
        for colour in row:
            wanted = np.array(Image.new("RGB", (1, 1), colour))[0, 0]
            hits = np.argwhere((sheet == wanted).all(-1))
            assert len(hits) >= 32 * 32 * 25
            places.append(hits.mean(0))
    (red, green), (blue, yellow) = places[:2], places[2:]
    assert red[0] == green[0] < blue[0] == yellow[0]
    assert red[1] == blue[1] < green[1] == yellow[1]


def test_samples_have_the_resolution_that_is_trained(tmp_path: Path):
    from haori.bases import find_base
    from haori.bases.diffusion import PipelineProcessor
    from haori.tasks.recipe import recipe_from
    from haori.tasks.text_to_image import TASK

    base = find_base(str(saved(stable_diffusion(), tmp_path / "base")))
    recipe = recipe_from(
        {"name": "t", "task": "text_to_image", "base": "b", "data": {"path": "p"}},
        ["data.resolution=50", "training.epochs=1", 'samples.prompts=["red"]'],
    )
    processor = PipelineProcessor(base)
    observer: Any = TASK.observer(recipe, base, processor, None, tmp_path)
    assert observer.size == (48, 48)  # of sides that divide by 4
    assert processor.native_size == 32
