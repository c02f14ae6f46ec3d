"""The loss that pictures are compared by, and drift, against stock diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from haori.bases import find_base, load_model
from haori.bases.diffusion import PipelineProcessor
from haori.core.errors import InputError
from haori.tasks.examination import USUAL, MeasureOptions
from haori.tasks.text_to_image.examination import LOSS, PictureExamination, drift
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.picture_adapters import UNET, adapted
from tests.pictures import picture_folder, section_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return find_base(str(saved(stable_diffusion("v_prediction"), tmp_path_factory.mktemp("sd") / "tiny")))


def rows_of(folder: Path) -> Any:
    from haori.data.pictures import read_pictures

    section = section_of(picture_folder(folder, 3, size=(32, 32)), validation_share=0.0)
    return read_pictures(section, native_size=32, size_multiple=4, cut=lambda caption: "").train


def stock_losses(examination: Any, rows: Any, scale: float = 1.0) -> list[float]:
    """Return each picture's summed loss by the stock pipeline's own parts; predictions are multiplied by `scale`."""
    import numpy as np
    from PIL import Image

    pipe = stable_diffusion("v_prediction")
    losses = []
    for number, row in enumerate(rows):
        pixels = torch.tensor(np.asarray(Image.open(row.file).convert("RGB")), dtype=torch.float32) / 127.5 - 1
        latents = pipe.vae.encode(pixels.permute(2, 0, 1)[None]).latent_dist.mode() * pipe.vae.config.scaling_factor
        ids = pipe.tokenizer(row.caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = pipe.text_encoder(ids)[0]
        total = 0.0
        for step in range(8):
            shown = examination._pictures._fixed(number, step)
            time = shown.timestep[None].long()
            noisy = pipe.scheduler.add_noise(latents, shown.noise[None], time)
            target = pipe.scheduler.get_velocity(latents, shown.noise[None], time)
            total += float((scale * pipe.unet(noisy, time, states).sample - target).square().mean())
        losses.append(total)
    return losses


def test_the_loss_is_that_of_the_stock_parts(base: Any, tmp_path: Path) -> None:
    rows, model = rows_of(tmp_path / "pictures"), load_model(base, dtype="fp32", device="cpu", components=("unet",))
    examination = PictureExamination(model, PipelineProcessor(base), rows, USUAL)
    with torch.no_grad():
        scores = examination.score(model, "base")
        expected, weaker = stock_losses(examination, rows), stock_losses(examination, rows, scale=0.9)
    found = [scores.answers[place].nll for place in range(3)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(weaker, rel=1e-2)
    assert scores.metrics[LOSS].value == pytest.approx(sum(expected) / 24, rel=1e-4)
    with pytest.raises(InputError, match="loss of the prediction alone"):
        PictureExamination(model, PipelineProcessor(base), rows, MeasureOptions(metrics=["generation"]))


def test_drift_is_the_share_by_which_predictions_moved(base: Any) -> None:
    processor = PipelineProcessor(base)
    assert set(drift(load_model(base, dtype="fp32", device="cpu"), processor).nll) == {0.0}
    model = adapted(base, UNET)
    found = drift(model, processor)
    assert all(0 < share < 1 for share in found.nll)
    for layer in model.modules():
        if hasattr(layer, "scaling") and "default" in layer.scaling:
            layer.scaling["default"] *= 0.01
    small = drift(model, processor)
    for layer in model.modules():
        if hasattr(layer, "scaling") and "default" in layer.scaling:
            layer.scaling["default"] *= 2
    # Of a small change the square is four times as large at twice the strength.
    assert drift(model, processor).nll == pytest.approx([4 * share for share in small.nll], rel=0.05)
