"""Pictures drawn with the base that comes with the package: against stock diffusers, alone and in batches, repeated."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from haori.bases import find_base
from haori.core.errors import HaoriError, InputError, LibraryError, MismatchError
from haori.images.adapters import PictureAdapters
from haori.images.generation import PictureGenerator, StepsDone
from haori.images.infotext import read_infotext
from haori.images.repeating import read_recorded, repeat
from haori.images.request import Hires, PictureRequest
from haori.library import Library
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.mixed_files import every_kind

STEPS = 3


@pytest.fixture(scope="module")
def generator(tmp_path_factory: Any) -> PictureGenerator:
    """A generator that knows two adapters in a mounted folder."""
    folder = tmp_path_factory.mktemp("generation")
    made = PictureGenerator(find_base("emoji-sd"))
    components = {"unet": made.pipeline.unet, "text_encoder": made.pipeline.text_encoder}
    for seed, name in enumerate(("ink", "oil"), 1):
        every_kind(components, seed).save(folder / "Lora" / f"{name}.safetensors")
    library = Library(folder / "library")
    library.mounts.add(folder / "Lora")
    made.adapters = PictureAdapters(components, made.base, library=library)
    return made


def ask(prompt: str = "noto red heart", **options: Any) -> PictureRequest:
    return PictureRequest(prompt, **{"steps": STEPS, "guidance": 3.0, "seed": 5, **options})


def values(image: Any) -> Any:
    return np.asarray(image).astype(int)


def apart(one: Any, other: Any) -> tuple[float, int]:
    """Return the share of values that differ, and by how much at most."""
    difference = np.abs(values(one) - values(other))
    return float((difference > 0).mean()), int(difference.max())


@pytest.fixture(scope="module")
def stock() -> Any:
    from diffusers import StableDiffusionPipeline

    from haori.bases.quiet import quiet_diffusers

    with quiet_diffusers():
        pipe = StableDiffusionPipeline.from_pretrained(find_base("emoji-sd").path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_picture_is_that_of_the_stock_pipeline(generator, stock):
    for options in ({}, {"negative": "fluent cat"}):
        drawn = generator.draw([ask(**options)])[0]
        expected = stock(
            "noto red heart", negative_prompt=options.get("negative"), num_inference_steps=STEPS, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
        ).images[0]  # fmt: skip
        assert apart(drawn.image, expected) == (0, 0)
    assert generator.pipeline.scheduler is generator._own


def test_pictures_of_a_batch_are_those_drawn_alone_up_to_the_last_digit(generator):
    together = generator.draw([ask(count=3)])
    alone = [generator.draw([ask(seed=5 + number)])[0] for number in range(3)]
    assert [one.seed for one in together] == [5, 6, 7]
    for one, other in zip(together, alone, strict=True):
        share, most = apart(one.image, other.image)
        assert share < 0.002 and most <= 1
    assert apart(together[0].image, together[1].image)[1] > 20


def test_one_batch_may_hold_pictures_of_different_adapters(generator):
    tags = ("", "<lora:ink:0.5>", "<lora:oil:te=0.2:unet=0.4>", "<lora:ink:0.5><lora:oil:-0.3>")
    prompts = [f"noto cat {tag}" for tag in tags]
    asked = [ask(prompt) for prompt in prompts]
    alone = [generator.draw([one])[0] for one in asked]
    generator.mixed = True
    try:
        together = generator.draw(asked)
    finally:
        generator.mixed = False
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        share, most = apart(one.image, other.image)
        assert share < 0.02 and most <= 1
        if number:
            assert apart(one.image, alone[0].image)[0] > 0.3
    assert "Lora application: on the fly" in together[1].infotext
    assert "Lora application" not in together[0].infotext


def test_strengths_add_and_half_of_twice_is_the_same(generator):
    once = generator.draw([ask("cat<lora:ink:0.5>")])[0]
    twice = generator.draw([ask("cat<lora:ink:0.2><lora:Lora/ink:0.3>")])[0]
    share, most = apart(once.image, twice.image)
    assert share < 0.02 and most <= 1


def test_a_schedule_holds_for_its_steps(generator):
    """What is on in no step but the last changes less than what is on in all; what never changes is the same."""
    base = generator.draw([ask("cat", steps=4)])[0].image
    flat = generator.draw([ask("cat<lora:ink:te=0:unet=0.5>", steps=4, application="on_the_fly")])[0].image
    even = generator.draw([ask("cat<lora:ink:te=0:unet=0.5@0,0.5@1>", steps=4)])[0].image
    none = generator.draw([ask("cat<lora:ink:te=0:unet=0@0,0@1>", steps=4)])[0].image
    late = generator.draw([ask("cat<lora:ink:te=0:unet=0@0.9,0.5@0.9>", steps=4)])[0].image
    assert apart(even, flat) == (0, 0)
    assert apart(none, base) == (0, 0)
    assert 0 < np.abs(values(late) - values(base)).mean() < 0.7 * np.abs(values(flat) - values(base)).mean()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "cat <lora:inkk:1>"}, "ink"),
        ({"prompt": "cat <lora:ink:nan>"}, "'nan' where a number"),
        ({"prompt": "noto red heart " * 40}, "longer than the base reads"),
        ({"negative": "noto red heart " * 40}, "longer than the base reads"),
        ({"width": 60, "height": 64}, "divide by 8; the nearest size is 64 x 64"),
        ({"width": 0, "height": 64}, "divide by 8"),
        ({"width": 80_000, "height": 80_000}, "too large"),
        ({"hires": Hires(1.3)}, "divide by 8"),
        ({"sampler": "Restart"}, "no counterpart"),
        ({"sampler": "Eulr"}, "did you mean 'euler'"),
        ({"sampler": "Euler a", "schedule": "Karras"}, "it has Automatic, Uniform"),
        ({"sampler": "LCM", "steps": 80}, "50 steps at most"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(generator, options, said):
    with pytest.raises(InputError) as error:
        generator.draw([ask(**options)])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "a" * 10_000}, "10,000 characters"),
        ({"negative": "a" * 10_000}, "10,000 characters"),
        ({"prompt": "a\0b"}, "control characters"),
        ({"prompt": "a\ud800b"}, "halves of characters"),
        ({"steps": 0}, "number of steps is 0"),
        ({"steps": 10**9}, "number of steps"),
        ({"count": 0}, "number of pictures"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 60}, "seed"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"strength": 0.0, "init": Image.new("RGB", (64, 64))}, "strength is 0"),
        ({"strength": 0.1, "init": Image.new("RGB", (64, 64))}, "leaves none of 3 steps"),
        ({"mask": Image.new("L", (64, 64))}, "give that picture too"),
        ({"mask": Image.new("L", (32, 64)), "init": Image.new("RGB", (64, 64))}, "mask has 32 x 64"),
        ({"width": 64}, "both width and height"),
        ({"schedule": "Karras"}, "needs a sampler"),
    ],
)
def test_requests_are_checked_when_they_are_made(options, said):
    with pytest.raises(InputError) as error:
        ask(**options)
    assert said in str(error.value)
    assert len(str(error.value)) < 300


def test_lenient_drawing_leaves_out_and_says_so(generator):
    drawn = generator.draw([ask("noto red heart<lora:gone:1><lora:ink:inf>", lenient=True)])[0]
    assert len(drawn.notes) == 2
    assert "'gone'" in drawn.notes[0] + drawn.notes[1]
    assert apart(drawn.image, generator.draw([ask()])[0].image) == (0, 0)


def test_emphasis_that_is_not_read_is_told(generator):
    assert "(red:1.2)" in generator.draw([ask("noto (red:1.2) heart")])[0].notes[0]
    assert generator.draw([ask("noto (red: heart) 1.2")])[0].notes == ()


def test_what_is_not_finite_is_no_picture(generator):
    bias = generator.pipeline.unet.conv_out.bias.data
    before = bias.clone()
    bias[3] = float("nan")
    try:
        with pytest.raises(HaoriError, match="not finite"):
            generator.draw([ask(count=2)])
    finally:
        bias.copy_(before)


def test_steps_are_counted_and_can_end_the_drawing(generator):
    seen: list[StepsDone] = []
    generator.draw([ask(count=2), ask("cat<lora:ink:0.5>")], seen.append)
    assert [one.done for one in seen] == [2, 4, 6, 7, 8, 9]
    assert {one.total for one in seen} == {9}

    class Stop(Exception):
        pass

    def stop(_steps: StepsDone) -> None:
        raise Stop

    before = {name: value.clone() for name, value in generator.pipeline.unet.state_dict().items()}
    with pytest.raises(Stop):
        generator.draw([ask("cat<lora:ink:0.5>", steps=8)], stop)
    after = generator.pipeline.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_picture_can_begin_from_another_as_in_the_stock_pipeline(generator, stock):
    from diffusers import StableDiffusionImg2ImgPipeline

    init = generator.draw([ask()])[0].image
    drawn = generator.draw([ask("noto sun", init=init, strength=0.7)])[0]
    expected = StableDiffusionImg2ImgPipeline(**stock.components, requires_safety_checker=False)
    expected.set_progress_bar_config(disable=True)
    picture = expected(
        "noto sun", image=init, strength=0.7, num_inference_steps=STEPS, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    assert apart(drawn.image, picture) == (0, 0)
    assert "Denoising strength: 0.7" in drawn.infotext


def test_what_lies_outside_a_mask_stays_to_the_byte(generator):
    init = generator.draw([ask()])[0].image
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    drawn = generator.draw([ask("fluent green apple", init=init, mask=mask, strength=1.0)])[0].image
    inside = np.asarray(mask) > 0
    assert (values(drawn)[~inside] == values(init)[~inside]).all()
    assert np.abs(values(drawn)[inside] - values(init)[inside]).mean() > 5
    whole = generator.draw([ask("fluent green apple", init=init, mask=Image.new("L", (64, 64), 255))])[0].image
    assert apart(whole, generator.draw([ask("fluent green apple", init=init)])[0].image) == (0, 0)


def test_the_hires_fix_draws_the_enlarged_picture_anew(generator):
    small = generator.draw([ask()])[0]
    large = generator.draw([ask(hires=Hires(2.0, strength=0.7))])[0]
    expected = generator.draw([ask(init=small.image.resize((128, 128), Image.Resampling.LANCZOS), strength=0.7)])[0]
    assert large.image.size == (128, 128)
    assert apart(large.image, expected.image) == (0, 0)


@pytest.mark.parametrize(
    ("upscaler", "mode", "antialias"),
    [("Latent", "bilinear", False), ("Latent (bicubic antialiased)", "bicubic", True)],
)
def test_enlarged_latents_are_drawn_anew_as_by_the_stock_pipelines(tmp_path, upscaler, mode, antialias):
    from diffusers import StableDiffusionImg2ImgPipeline

    stock = stable_diffusion()  # four channels, so that the stock pipeline takes its latents for a picture
    saved(stock, tmp_path / "base")
    generator = PictureGenerator(find_base(str(tmp_path / "base")))
    first = ask("a cat", width=32, height=32, hires=Hires(1.5, strength=0.7, upscaler=upscaler))
    drawn = generator.draw([first, replace(first, seed=6)])
    stock.set_progress_bar_config(disable=True)
    again = StableDiffusionImg2ImgPipeline(**stock.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    both = {"prompt": "a cat", "num_inference_steps": STEPS, "guidance_scale": 3.0}
    for seed, picture in zip((5, 6), drawn, strict=True):
        own = [torch.Generator().manual_seed(seed) for _ in range(2)]
        latents = stock(**both, width=32, height=32, output_type="latent", generator=own[0]).images
        side = 3 * latents.shape[-1] // 2
        large = torch.nn.functional.interpolate(latents, (side, side), mode=mode, antialias=antialias)
        expected = again(**both, image=large, strength=0.7, generator=own[1]).images[0]
        assert picture.image.size == (48, 48) == expected.size
        assert apart(picture.image, expected)[1] <= 1
        assert f"Hires upscaler: {upscaler}" in picture.infotext
    assert apart(drawn[0].image, drawn[1].image)[1] > 5


def test_latents_are_enlarged_after_a_first_pass_from_noise_alone(generator):
    large = generator.draw([ask(hires=Hires(2.0, upscaler="Latent"))])[0]
    assert large.image.size == (128, 128)
    with pytest.raises(InputError, match="first pass from noise"):
        generator.draw([ask(init=large.image.resize((64, 64)), hires=Hires(2.0, upscaler="Latent"))])


REPEATED = [
    {"prompt": "noto cat <lora:ink:0.5>", "negative": 'a, b: "c"\nd', "sampler": "Euler a"},
    {"prompt": "noto cat", "guidance": None, "width": 72, "height": 64},
    {"prompt": "noto cat<lora:ink:0.5@0,0@1>", "count": 2, "sampler": "DPM++ 2M", "schedule": "karras"},
    {"prompt": "noto cat", "hires": Hires(1.5, 2, 0.6, "Nearest")},
    {"prompt": "noto cat", "hires": Hires(1.5, 2, 0.6, "Latent (nearest)")},
]


@pytest.mark.parametrize("options", REPEATED)
def test_a_picture_is_drawn_again_to_the_byte_from_its_text(generator, tmp_path, options):
    drawn = generator.draw([ask(**options)])[-1]
    path = tmp_path / "a.png"
    path.write_bytes(drawn.png())
    again = repeat(path, read_recorded(path), generator)
    assert again.difference == ""
    assert again.picture.png() == path.read_bytes()
    assert read_infotext(drawn.infotext).prompt == options["prompt"]


def test_what_was_replaced_since_is_told(generator, tmp_path):
    path = tmp_path / "a.png"
    drawn = generator.draw([ask("cat<lora:ink:0.5>")])[0]
    digits = generator.adapters.get("ink").short_hash
    for old, new, said in (
        (digits, "0" * 12, "adapter 'ink' of hash 0000"),
        (f"Model hash: {generator.base.id[:10]}", "Model hash: 0123456789", "of hash 0123456789"),
    ):
        assert old in drawn.infotext
        path.write_bytes(replaced(drawn, old, new))
        with pytest.raises(MismatchError, match=said):
            repeat(path, read_recorded(path), generator)
        again = repeat(path, read_recorded(path, lenient=True), generator)
        assert again.difference == "" and said in again.picture.notes[0]
    path.write_bytes(replaced(drawn, "lora:ink", "lora:lost"))
    with pytest.raises(LibraryError, match="lost"):
        repeat(path, read_recorded(path), generator)


def replaced(drawn: Any, old: str, new: str) -> bytes:
    from haori.images.infotext import png_bytes

    return png_bytes(drawn.image, drawn.infotext.replace(old, new))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("Steps: x", "'x', which is no number"),
        ("Steps: nan", "finite"),
        ("Steps: 999999999999", "number of steps"),
        ("Steps: 3, Seed: -1", "seed is -1"),
        ("Steps: 3, Size: 64", "expected width and height"),
        ("Steps: 3, Size: 9999999999999999999x1", "expected width and height"),
        ("Steps: 3, CFG scale: 1e400", "finite"),
        ("Steps: 3, Batch size: 2, Batch pos: 7", "number 7 of 2"),
        ("Steps: 3, Sampler: Restart", "no counterpart"),
        ("Steps: 3, Clip skip: 2", "'Clip skip'"),
        ("Steps: 3, Hires upscale: 900", "hires fix is 900"),
    ],
)
def test_hostile_texts_are_one_sentence(tmp_path, settings, said):
    from haori.images.infotext import png_bytes

    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(Image.new("RGB", (8, 8)), f"a cat\n{settings}"))
    with pytest.raises(InputError) as error:
        read_recorded(path)
    assert said in str(error.value)
    assert len(str(error.value)) < 400


def test_the_command_draws_and_repeats(tmp_path: Path, capsys: Any):
    from tests.command_line import haori

    out = tmp_path / "out"
    options = ("--base", "emoji-sd", "--steps", 2, "--seed", 7, "--out", out)
    done = haori(capsys, "generate", "noto cat", "noto dog", *options, "--n", 2)
    assert done.code == 0, done.err
    files = sorted(path.name for path in out.iterdir())
    assert files == ["00000-7.png", "00001-8.png", "00002-7.png", "00003-8.png"]
    again = haori(capsys, "generate", "--from", out / "00003-8.png", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "00000-8.png").read_bytes() == (out / "00003-8.png").read_bytes()
    assert "Its pixels are those" in again.out
    axes = ("--grid", "steps=1,2", "seed=1..2")
    drawn = haori(capsys, "generate", "noto cat", "--base", "emoji-sd", *axes, "--out", tmp_path / "grid")
    assert drawn.code == 0, drawn.err
    assert len(list((tmp_path / "grid").glob("*.png"))) == 5
    with Image.open(tmp_path / "grid" / "00000-grid.png") as sheet:
        assert sheet.width > 300
    for wrong, said in (
        (("generate", *axes, "--base", "emoji-sd"), "Give a prompt beside"),
        (("generate", "cat", *options, "--grid", "sede=1"), "did you mean 'seed'"),
        (("generate", "cat <lora:nobody:1>", *options), "nobody"),
        (("generate", "cat"), "tells the base"),
        (("generate", "cat", *options, "--size", "64"), "512x768"),
        (("generate", "cat", *options, "--strength", "0.5"), "--init"),
        (("generate", "cat", *options, "--upscaler", "Nearest"), "--hires 2"),
        (("generate", "--from", out / "00003-8.png", "--steps", "3"), "'steps'"),
        (("generate", "--from", tmp_path / "none.png"), "none.png"),
    ):
        failed = haori(capsys, *wrong)
        assert failed.code == 2
        assert said in failed.err and failed.err.count("\n") == 1
