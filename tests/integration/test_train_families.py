"""Every family of image bases: trained, resumed bit for bit, proved, exported, and drawn alike by stock diffusers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from haori.api import resume, train
from haori.bases import find_base
from haori.bases.diffusion import load_diffusion_model
from haori.library import export_in_format
from haori.library.adapter_files import inspect_adapter
from haori.library.attaching import attach_files
from tests.diffusion_pipelines import FAMILIES, saved
from tests.picture_adapters import drawn
from tests.pictures import picture_folder

STEPS = 4


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: Any, tmp_path_factory: Any) -> Any:
    from haori.core.settings import settings

    root = tmp_path_factory.mktemp(request.param)
    base = saved(FAMILIES[request.param](), root / "base")
    data = picture_folder(root / "data", 5, size=(48, 32), caption="a red cat {}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(root / "home"))
        settings.cache_clear()
        found = train(
            base=str(base), data=str(data), name="style", progress=False,
            overrides=[
                "training.epochs=9", f"training.max_steps={STEPS}", "training.save_every=2", "optimizer.lr=0.02",
                "training.batch_size=2", "samples.prompts=[]", "training.dtype=fp32", "training.keep_checkpoints=9",
                "method.rank=4", "data.resolution=32", "data.flip=true", "data.caption_dropout=0.3",
            ],
        )  # fmt: skip
        export_in_format("style", found.folder / "style.safetensors", "diffusers")
    settings.cache_clear()
    return found


def test_it_is_trained_and_proved_and_a_resumed_run_ends_bit_equal(run: Any, tmp_path: Path):
    assert run.verification.passed
    assert run.record.steps == STEPS
    part = shutil.copytree(run.folder, tmp_path / "part")
    shutil.rmtree(part / f"checkpoints/step-{STEPS:08d}")
    shutil.rmtree(part / "adapter")
    for later in (part / "checkpoints").iterdir():
        if int(later.name[-8:]) > 2:
            shutil.rmtree(later)
    record = json.loads((part / "run.json").read_text())
    (part / "run.json").write_text(json.dumps(record | {"status": "stopped", "adapter": None}))
    resume(part, progress=False)
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run.folder, part))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_stock_diffusers_draws_what_was_trained(run: Any):
    from diffusers import DiffusionPipeline

    base = find_base(run.recipe.base)
    pipeline = DiffusionPipeline.from_pretrained(base.path, local_files_only=True)
    bare = drawn(pipeline)
    pipeline.load_lora_weights(str(run.folder), weight_name="style.safetensors")
    found = drawn(pipeline)
    model = load_diffusion_model(base, dtype="fp32", device="cpu", components=())
    attach_files(model, inspect_adapter(run.folder / "adapter"), base_name=base.name)
    live = DiffusionPipeline.from_pretrained(base.path, local_files_only=True)
    setattr(live, model.family.denoiser, model.denoiser)
    expected = drawn(live)
    effect = (expected - bare).norm()
    assert effect > 0.01 * bare.norm()
    assert (found - expected).norm() < 0.01 * effect  # a tenth of the effect lost would be ten times as much
