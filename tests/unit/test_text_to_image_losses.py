"""Losses of pictures against the papers' formulas in float64, with planted faults; grouping, masks and variants."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from haori.bases.diffusion import PipelineProcessor, load_diffusion_model
from haori.tasks.recipe import recipe_from
from haori.tasks.text_to_image import TASK
from haori.tasks.text_to_image.encoded import Encoded
from haori.tasks.text_to_image.objective import MeasuredPictures, TrainingPictures
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.pictures import picture, picture_folder

PREDICTIONS = ("epsilon", "v_prediction")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from haori.bases import find_base

    root = tmp_path_factory.mktemp("bases")
    return {kind: find_base(str(saved(stable_diffusion(kind), root / kind))) for kind in PREDICTIONS}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_HOME", str(tmp_path / "home"))
    settings.cache_clear()


def made(base: Any, data: Path, *overrides: str) -> Any:
    """Return base, model, split and objective as training has them."""
    fixed = ["data.resolution=32", "data.bucket_step=8", "noise.timesteps=uniform", "data.validation_share=0"]
    recipe = recipe_from(
        {"name": "t", "task": "text_to_image", "base": "b", "data": {"path": str(data)}}, [*fixed, *overrides]
    )
    processor = PipelineProcessor(base)
    split = TASK.rows(recipe, base, processor)
    TASK.ready(recipe, base, processor, split, "cpu")
    model = load_diffusion_model(base, dtype="fp32", device="cpu", components=("unet",))
    return SimpleNamespace(
        base=base, processor=processor, recipe=recipe, split=split, model=model,
        training=TASK.objective(split.train, processor, recipe), measured=TASK.measured(split.train, processor, recipe),
    )  # fmt: skip


def alphas_bar() -> np.ndarray:
    """Return the products of 1 - beta_t of the scaled-linear schedule of tests/diffusion_pipelines.py."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_loss_is_that_of_the_papers(bases: Any, tmp_path: Path, kind: str, gamma: float | None):
    """DDPM eq. 14, v of Salimans and Ho 2022, min-SNR of Hang et al. 2023 eq. 5, the sums formed here in float64."""
    overrides = [f"noise.min_snr_gamma={gamma}"] if gamma else []
    case = made(bases[kind], picture_folder(tmp_path / "data", 3, size=(32, 32)), *overrides)
    torch.manual_seed(3)
    batch = case.training.batch([0, 1, 2])
    (group,) = batch.groups
    noisy, times = group.inputs["noisy"].double(), group.inputs["timesteps"]
    bar = torch.tensor(alphas_bar()[times.long().numpy()])[:, None, None, None]
    latents = torch.stack([case.training.encoded.latents(row) for row in case.split.train]).double()
    noise = (noisy - bar.sqrt() * latents) / (1 - bar).sqrt()
    assert 0.7 < float(noise.std()) < 1.3  # so the latents are these, with noise of spread 1
    wanted = noise if kind == "epsilon" else bar.sqrt() * noise - (1 - bar).sqrt() * latents
    with torch.no_grad():
        predicted = case.model(**group.inputs).sample.double()
        found = case.training.loss(case.model, batch)
    snr = (bar / (1 - bar)).flatten()
    weight = torch.ones_like(snr)
    if gamma is not None:
        weight = snr.clamp_max(gamma) / (snr if kind == "epsilon" else snr + 1)
    expected = (predicted - wanted).square().flatten(1).mean(1) * weight
    torch.testing.assert_close(found.each.double(), expected, rtol=1e-4, atol=1e-6)
    assert found.count == 3
    assert float(found.total) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_offset_noise_is_the_same_all_over_a_channel(bases: Any, tmp_path: Path):
    data = picture_folder(tmp_path / "data", 1, size=(32, 32))
    spread = {}
    for offset in (0.0, 1.0):
        case = made(bases["epsilon"], data, f"noise.offset={offset}")
        torch.manual_seed(0)
        means = [case.training.batch([0]).groups[0].target.mean((0, 2, 3)) for _ in range(60)]
        spread[offset] = float(torch.stack(means).var())
    assert spread[0.0] == pytest.approx(1 / 64, rel=0.3)  # of the mean of 64 latent pixels
    assert spread[1.0] == pytest.approx(1 + 1 / 64, rel=0.3)


def test_pictures_of_several_sizes_lose_what_each_loses_alone(bases: Any, tmp_path: Path):
    data = picture_folder(tmp_path / "data", 2, size=(32, 32))
    for number, size in ((7, (64, 32)), (8, (32, 64)), (9, (64, 32))):
        picture(number, size).save(data / f"wide{number}.png")
        (data / f"wide{number}.txt").write_text("a cat")
    case = made(bases["epsilon"], data)
    assert len({row.bucket for row in case.split.train}) == 3
    batch = case.measured.batch(range(len(case.measured.costs)))
    assert len(batch.groups) == 3
    with torch.no_grad():
        whole = case.measured.loss(case.model, batch)
        alone = [
            float(case.measured.loss(case.model, case.measured.batch([row])).total)
            for row in range(len(case.measured.costs))
        ]
        part = case.measured.loss(case.model, case.measured.part(batch, [3, 17, 4]))
    by_place = dict(zip(whole.row_of.tolist(), whole.each.tolist(), strict=True))
    assert [by_place[place] for place in range(len(alone))] == pytest.approx(alone, rel=1e-5)
    by_place = dict(zip(part.row_of.tolist(), part.each.tolist(), strict=True))
    assert [by_place[place] for place in range(3)] == pytest.approx([alone[3], alone[17], alone[4]], rel=1e-5)
    assert case.measured.part(batch, [3, 17, 4]).rows == (3, 17, 4)
    blank = case.measured.loss(case.model, case.measured.blank(batch))
    assert blank.count == 0
    assert float(blank.total) == 0.0


def test_measured_pictures_are_always_the_same_and_spread_over_the_timesteps(bases: Any, tmp_path: Path):
    data = picture_folder(tmp_path / "data", 3, size=(32, 32))
    case = made(bases["epsilon"], data, "data.flip=true", "data.crop=random")
    torch.manual_seed(1)
    one = case.measured.batch([5, 2]).groups[0]
    torch.manual_seed(2)
    other = case.measured.batch([2, 5]).groups[0]
    assert torch.equal(one.inputs["noisy"], other.inputs["noisy"].flip(0))
    again = made(bases["epsilon"], data, "data.flip=true", "data.crop=random")
    assert torch.equal(one.inputs["noisy"], again.measured.batch([5, 2]).groups[0].inputs["noisy"])
    times = case.measured.batch([0, 1, 2, 3]).groups[0].inputs["timesteps"]
    assert times.diff().min() > 200
    assert times.min() < 200
    assert times.max() > 800


def test_a_mask_leaves_only_its_part(bases: Any, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    half = np.zeros((32, 32), np.uint8)
    half[:, 16:] = 255
    for number in range(2):
        image = picture(number, (32, 32)).convert("RGBA")
        image.putalpha(Image.fromarray(half))
        image.save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("a cat")
    case = made(bases["epsilon"], data, "data.masks=alpha", "data.unmasked_weight=0.25")
    (group,) = case.measured.batch([0]).groups
    with torch.no_grad():
        error = (case.model(**group.inputs).sample - group.target).double().square()[0].mean(0)  # [h, w]
        found = float(case.measured.loss(case.model, case.measured.batch([0])).total)
    side = error.shape[1] // 2
    assert found == pytest.approx(float((0.25 * error[:, :side]).mean() + error[:, side:].mean()) / 2, rel=1e-5)
    assert found != pytest.approx(float(error.mean()), rel=0.05)


def test_regularisation_pictures_weigh_as_they_should_and_are_not_held_out(bases: Any, tmp_path: Path):
    data = picture_folder(tmp_path / "data", 2, size=(32, 32))
    more = picture_folder(tmp_path / "class", 4, size=(32, 32), caption="other {}")
    for path in more.glob("*.png"):
        picture(50 + int(path.stem), (32, 32)).save(path)
    case = made(bases["epsilon"], data, f"data.regularisation={more}", "data.prior_weight=0.5")
    rows = case.training.rows
    assert [row.prior for row in rows].count(True) == 4
    torch.manual_seed(0)
    (group,) = case.training.batch(range(6)).groups
    assert group.weights.tolist() == [0.5 if row.prior else 1.0 for row in rows]


def test_a_changed_caption_or_picture_is_never_served_from_before(bases: Any, tmp_path: Path):
    data = picture_folder(tmp_path / "data", 2, size=(32, 32))
    before = made(bases["epsilon"], data).measured.batch([0]).groups[0]
    (data / "00.txt").write_text("red")
    after = made(bases["epsilon"], data).measured.batch([0]).groups[0]
    name = "text_states"
    assert name in before.inputs
    assert not torch.equal(before.inputs[name], after.inputs[name])
    assert torch.equal(before.inputs["noisy"], after.inputs["noisy"])
    picture(77, (32, 32)).save(data / "00.png")
    changed = made(bases["epsilon"], data)
    rows = {row.origin: number for number, row in enumerate(changed.split.train)}
    place = next(number for origin, number in rows.items() if origin.endswith("00.png"))
    assert not torch.equal(before.target, changed.measured.batch([4 * place]).groups[0].target)


def test_what_is_known_is_not_computed_again(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = picture_folder(tmp_path / "data", 2, size=(32, 32))
    made(bases["epsilon"], data)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded for what is known already")

    monkeypatch.setattr(PipelineProcessor, "load_vae", refuse)
    monkeypatch.setattr(PipelineProcessor, "load_text_encoders", refuse)
    made(bases["epsilon"], data)
    with pytest.raises(AssertionError):
        made(bases["epsilon"], data, "data.flip=true")


def test_a_picture_whose_latents_are_not_finite_is_named(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from haori.core.errors import DataError

    data = picture_folder(tmp_path / "data", 3, size=(32, 32))
    load = PipelineProcessor.load_vae

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        """Return a VAE that overflows at bright pictures, as some do in 16 bits."""
        vae: Any = load(self, *args, **options)
        encode = vae.encode

        def overflowing(pixels: torch.Tensor) -> Any:
            found = encode(pixels)
            brightest = pixels.mean((1, 2, 3)).argmax()
            found.latent_dist.mean[brightest] = torch.nan
            return found

        vae.encode = overflowing
        return vae

    monkeypatch.setattr(PipelineProcessor, "load_vae", broken)
    Image.new("RGB", (32, 32), "white").save(data / "01.png")
    with pytest.raises(DataError, match=r"not finite for the picture '.*01\.png'"):
        made(bases["epsilon"], data)


@pytest.mark.parametrize(("dropout", "empty"), [(0.0, 0), (1.0, 40)])
def test_caption_dropout_and_trigger(bases: Any, tmp_path: Path, dropout: float, empty: int):
    data = picture_folder(tmp_path / "data", 2, size=(32, 32))
    case = made(bases["epsilon"], data, f"data.caption_dropout={dropout}", "data.trigger=red")
    blank = case.training.encoded.text([""])["text_states"]
    torch.manual_seed(0)
    seen = [case.training.batch([0]).groups[0].inputs["text_states"] for _ in range(40)]
    assert sum(torch.equal(one, blank) for one in seen) == empty
    with_trigger = case.training.encoded.text(["red, a picture of 0"])["text_states"]
    assert dropout or all(torch.equal(one, with_trigger) for one in seen)


def test_repeats_come_as_often_as_they_are_asked_for(bases: Any, tmp_path: Path):
    data = tmp_path / "data"
    picture_folder(data / "3_cat", 2, size=(32, 32))
    case = made(bases["epsilon"], data)
    assert len(case.training.costs) == 6
    assert isinstance(case.training, TrainingPictures)
    assert isinstance(case.measured, MeasuredPictures)
    assert isinstance(case.training.encoded, Encoded)
