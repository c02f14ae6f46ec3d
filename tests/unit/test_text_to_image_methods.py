"""Every kind of method on a tiny pipeline: trained, resumed bit for bit, proved, and read by stock PEFT or diffusers."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from haori.core.events import discard
from haori.library import export_in_format
from haori.tasks.recipe import recipe_from
from haori.training.finish import prove_and_store
from haori.training.preparation import Prepared, prepare
from haori.training.session import train_prepared
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.pictures import picture_folder

WITH_CONVOLUTIONS = "method.target=[all-linear,convolutions]"
SMALL: dict[str, Any] = {"block_out_channels": (8, 16), "attention_head_dim": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from haori.core.settings import settings

    folder = tmp_path_factory.mktemp("methods")
    saved(stable_diffusion(**SMALL), folder / "sd15")
    picture_folder(folder / "data", 4, size=(32, 32), caption="a red cat {}")
    yield folder
    settings.cache_clear()


@pytest.fixture(autouse=True)
def shared_home(root: Path, haori_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_HOME", str(root / "home"))
    settings.cache_clear()


def prepared(root: Path, *overrides: str, base: str = "sd15", data: str = "data") -> Prepared:
    document = {"name": "x", "task": "text_to_image", "base": str(root / base), "data": {"path": str(root / data)}}
    fixed = [
        "data.resolution=32", "data.bucket_step=8", "data.validation_share=0", "training.epochs=9",
        "samples.prompts=[]", "training.max_steps=2", "training.save_every=1", "training.batch_size=2", "training.dtype=fp32",
        "optimizer.lr=0.02", *([] if any("type:" in item for item in overrides) else ["method.rank=4"]),
    ]  # fmt: skip
    return prepare(recipe_from(document, [*fixed, *overrides]))


METHODS = {
    "rslora": ["method.rslora=true", "method.rank_pattern={to_q: 2}", "method.lr_ratio=16", WITH_CONVOLUTIONS],
    "dora": ["method.kind=dora", WITH_CONVOLUTIONS],
    "adalora": ["method.kind=adalora", "training.max_steps=4", "training.save_every=2"],
    "ard_lora": ["method.kind=ard_lora", "method.target=attention", "training.max_steps=4", "training.save_every=2"],
    "lokr": ["method={kind: peft, type: LOKR, target: attention, options: {r: 2}}"],
    "loha": ["method={kind: peft, type: LOHA, target: [attention, convolutions], options: {r: 2}}"],
    "qlora": ["method.kind=qlora", "method.target=attention"],
    "loftq": ["method.kind=qlora", "method.init=loftq", "method.target=attention", "training.dtype=bf16"],
    "ema": ["training.ema=0.5", "training.gradient_checkpointing=true", "training.text_encoder=true"],
}
DRAWN_BY_DIFFUSERS = {"rslora", "adalora", "ard_lora"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_from_pictures_to_stock_tools(root: Path, tmp_path: Path, name: str) -> None:
    run = prepared(root, f"name={name}", *METHODS[name])
    (tmp_path / "whole").mkdir()
    trained = train_prepared(run, tmp_path / "whole", None, "2026-01-01T00:00:00+00:00", discard)
    stored = prove_and_store(run, tmp_path / "whole", trained.record, trained.live, discard)
    assert stored.card.verification is not None and stored.card.verification.passed
    first = sorted((tmp_path / "whole" / "checkpoints").iterdir())[0]
    shutil.copytree(first, tmp_path / "again" / "checkpoints" / first.name)
    train_prepared(run, tmp_path / "again", first, "2026-01-01T00:00:00+00:00", discard)
    one, other = (tmp_path / part / "adapter" / "adapter_model.safetensors" for part in ("whole", "again"))
    assert one.read_bytes() == other.read_bytes()
    if name == "ema":
        return
    assert trained.live is not None
    plain = name not in {"qlora", "loftq"}  # their live model is the quantised one
    export_in_format(name, tmp_path / "peft", "peft")
    theirs = noise_of_peft(root, tmp_path / "peft", trained.live.probes)
    if plain:
        check_alike(root, theirs, trained.live.logits, trained.live.probes)
    export_in_format(name, tmp_path / "kohya.safetensors", "kohya")
    if name in DRAWN_BY_DIFFUSERS or not plain:
        for kind in ("kohya", "diffusers"):
            if kind == "diffusers":
                export_in_format(name, tmp_path / "diffusers.safetensors", "diffusers")
            check_alike(root, noise_of_diffusers(root, tmp_path / f"{kind}.safetensors", trained.live.probes), theirs,
                        trained.live.probes)  # fmt: skip


def stock_unet(root: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(root / "sd15" / "unet", local_files_only=True).eval()


@torch.no_grad()
def noise(unet: Any, probes: Any) -> list[torch.Tensor]:
    return [unet(p["noisy"], p["timesteps"], p["text_states"].float()).sample.reshape(-1, 1) for p in probes]


def noise_of_peft(root: Path, folder: Path, probes: Any) -> list[torch.Tensor]:
    from peft import PeftModel

    (part,) = (path for path in folder.iterdir() if path.is_dir())
    return noise(PeftModel.from_pretrained(stock_unet(root), part).eval(), probes)


def noise_of_diffusers(root: Path, file: Path, probes: Any) -> list[torch.Tensor]:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(root / "sd15", safety_checker=None, local_files_only=True)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return noise(pipeline.unet, probes)


def check_alike(root: Path, found: Any, expected: Any, probes: Any) -> None:
    bare = noise(stock_unet(root), probes)
    effect = (torch.cat(expected) - torch.cat(bare)).norm()
    assert effect > 1e-3 * torch.cat(bare).norm()
    assert (torch.cat(found) - torch.cat(expected)).norm() < 0.02 * effect
