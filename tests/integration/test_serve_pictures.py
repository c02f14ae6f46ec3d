"""The server for pictures with the clients that people use: webuiapi and openai, against stock diffusers."""

import base64
import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import webuiapi
from PIL import Image

from haori.bases.quiet import quiet_diffusers
from haori.images.request import PictureRequest
from haori.server.sdapi.fields import Img2ImgFields, Txt2ImgFields
from tests.picture_server import components_of, drawing_server, tiny_generator, write_lora
from tests.server_samples import until

STEPS = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("pictures")
    with drawing_server(tiny_generator(folder), folder) as running:
        yield running


@pytest.fixture(scope="module")
def api(server: Any) -> Any:
    return webuiapi.WebUIApi(port=server.port, sampler="DDIM", steps=STEPS)


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def stock(server: Any) -> Any:
    """The stock pipeline of the same folder."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(server.generator.base.path, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(**options: Any) -> dict[str, Any]:
    return {"prompt": "a red cat", "seed": 5, "cfg_scale": 3.0, "width": 32, "height": 32, **options}


def drawn_by(pipe: Any, seed: int = 5, prompt: str = "a red cat", **options: Any) -> Any:
    found = pipe(
        prompt, num_inference_steps=STEPS, guidance_scale=3.0, generator=torch.Generator().manual_seed(seed), **options
    )
    return found.images[0]


def values(image: Any) -> Any:
    return np.asarray(image.convert("RGB")).astype(int)


def apart(one: Any, other: Any) -> int:
    """Return by how much two pictures differ at most, of 255."""
    return int(np.abs(values(one) - values(other)).max())


def test_webuiapi_gets_the_picture_of_stock_diffusers(server, api, stock):
    found = api.txt2img(**ask())
    assert apart(found.image, drawn_by(stock, height=32, width=32)) == 0
    assert found.image.info["parameters"] == found.info["infotexts"][0]
    assert found.info["all_seeds"] == [5] and found.info["sd_model_name"] == "tiny-sd"
    assert found.parameters["cfg_scale"] == 3.0 and found.parameters["seed"] == 5
    assert isinstance(found.json["info"], str)
    # As the client sends it, DDIM would get fresh noise; the web UI takes that in silence.
    assert found.info["warnings"] == ["'eta' 1 was not used: DDIM is drawn without fresh noise (eta 0)."]
    line = json.loads(server.log.getvalue().splitlines()[-1])
    assert (line["path"], line["status"], line["finish"]) == ("/sdapi/v1/txt2img", 200, "stop")
    assert (line["pictures"], line["picture_steps"]) == (1, STEPS)
    metrics = httpx.get(f"{server.url}/metrics").text
    for figure in ("pictures_total", "picture_requests_total", "picture_steps_total", "picture_requests_running"):
        assert f"haori:{figure}{{" in metrics, figure


def test_the_sampler_is_the_one_that_was_named(api, stock):
    from diffusers import EulerAncestralDiscreteScheduler

    with quiet_diffusers():
        stock.scheduler = EulerAncestralDiscreteScheduler.from_config(stock.scheduler.config)
        expected = drawn_by(stock, height=32, width=32)
    found = api.txt2img(**ask(sampler_name="Euler a", scheduler="automatic"))
    assert apart(found.image, expected) <= 1
    assert found.info["sampler_name"] == "Euler a" and found.info["warnings"] == []


def test_batches_and_rounds_have_the_seeds_that_follow(server, api):
    found = api.txt2img(**ask(batch_size=2, n_iter=2))
    assert found.info["all_seeds"] == [5, 6, 7, 8]
    request = PictureRequest(
        "a red cat", seed=7, count=2, steps=STEPS, guidance=3.0, width=32, height=32, sampler="DDIM"
    )
    expected = server.generator.draw([request])
    assert [apart(*pair) for pair in zip(found.images[2:], (one.image for one in expected), strict=True)] == [0, 0]
    assert apart(found.images[0], found.images[1]) > 20


def test_a_seed_that_was_drawn_is_told(api):
    found = api.txt2img(**ask(seed=-1))
    assert found.info["seed"] >= 0
    again = api.txt2img(**ask(seed=found.info["seed"]))
    assert apart(found.image, again.image) == 0


def test_a_tag_puts_an_adapter_on_as_stock_diffusers_does(server, api, stock):
    tree = server.library.root.parent / "Lora"
    base = drawn_by(stock, prompt="a cat ", height=32, width=32)
    stock.load_lora_weights(tree / "line.safetensors", adapter_name="line")
    halves = []
    for strength in (0.5, 0.55):
        stock.set_adapters(["line"], [strength])
        halves.append(drawn_by(stock, prompt="a cat ", height=32, width=32))
    found = api.txt2img(**ask(prompt="a cat <lora:line:0.5>"))
    assert apart(found.image, halves[0]) <= 1 < apart(*halves) < apart(base, halves[0])
    found = api.txt2img(**ask(prompt="a cat <lora:ink:0.5>"))
    by_alias = api.txt2img(**ask(prompt="a cat <lora:ink_by_trainer:0.5>"))
    assert apart(by_alias.image, found.image) == 0
    assert 'Lora hashes: "ink: ' in found.info["infotexts"][0]


def test_loras_are_listed_with_what_stands_beside_them(server, api):
    listed = {entry["name"]: entry for entry in api.get_loras()}
    assert listed["ink"]["alias"] == "ink_by_trainer" and listed["ink"]["path"] == "Lora/ink.safetensors"
    oil = listed["oil"]
    assert oil["path"] == "Lora/styles/oil.safetensors"
    said = {"activation text": "oil paint", "preferred weight": 0.6, "notes": "soft", "category": "styles"}
    assert said.items() <= oil["metadata"].items()
    preview = httpx.get(f"{server.url}{oil['metadata']['preview']}")
    assert preview.headers["content-type"] == "image/png" and Image.open(io.BytesIO(preview.content)).size == (4, 4)
    assert str(server.library.root.parent) not in httpx.get(f"{server.url}/sdapi/v1/loras").text


def test_new_and_replaced_files_count(server, api):
    tree, components = server.library.root.parent / "Lora", components_of(server.generator)
    write_lora(tree / "new.safetensors", components, 3)
    assert "new" not in [entry["name"] for entry in api.get_loras()]
    refreshed = api.custom_post("refresh-loras", baseurl=True).json
    assert refreshed["changed"] >= 1 and "new" in [entry["name"] for entry in api.get_loras()]
    first = api.txt2img(**ask(prompt="cat <lora:new:1>")).image
    write_lora(tree / "new.safetensors", components, 4)
    second = api.txt2img(**ask(prompt="cat <lora:new:1>")).image
    assert apart(first, second) > 3
    (tree / "new.safetensors").unlink()
    with pytest.raises(RuntimeError, match="new"):
        api.txt2img(**ask(prompt="cat <lora:new:1>"))


def test_img2img_is_that_of_stock_diffusers(api, stock):
    from diffusers import StableDiffusionImg2ImgPipeline

    first = drawn_by(stock, height=32, width=32)
    pipe = StableDiffusionImg2ImgPipeline(**stock.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    expected = drawn_by(pipe, image=first, strength=0.7)
    found = api.img2img([first], denoising_strength=0.7, **ask())
    assert apart(found.image, expected) == 0
    assert found.parameters["init_images"] is None


def test_resize_modes_stretch_crop_and_fill(api):
    """With next to nothing drawn anew, the picture is the one that was given, in the size asked for."""
    wide = Image.new("RGB", (64, 32), (200, 30, 30))
    wide.paste((30, 30, 200), (20, 0, 64, 12))
    found = [
        values(api.img2img([wide], resize_mode=mode, denoising_strength=0.34, **ask()).image) for mode in (0, 1, 2)
    ]
    assert all(one.shape == (32, 32, 3) for one in found)
    assert len({one.tobytes() for one in found}) == 3


def test_a_mask_keeps_what_is_black_and_draws_what_is_white(api, stock):
    first = drawn_by(stock, height=32, width=32)
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    inside = np.asarray(mask) > 0
    for options in ({"inpaint_full_res": False}, {"inpaint_full_res": True, "inpaint_full_res_padding": 2}):
        options |= {"mask_blur": 0, "inpainting_fill": 1}
        found = api.img2img([first], mask_image=mask, **options, **ask())
        changed = (values(found.image) != values(first)).any(-1)
        assert changed[inside].mean() > 0.8 and not changed[~inside].any()
        turned = api.img2img([first], mask_image=mask, inpainting_mask_invert=1, **options, **ask())
        assert not (values(turned.image) != values(first)).any(-1)[inside].any()
    soft = api.img2img([first], mask_image=mask, mask_blur=2, **ask())
    changed = (values(soft.image) != values(first)).any(-1)
    assert changed[~inside].any() and not changed[0].any()
    assert "Mask blur: 2" in soft.info["infotexts"][0] and "Inpaint area: Only masked" in soft.info["infotexts"][0]


def test_the_second_pass_enlarges(server, api):
    found = api.txt2img(**ask(enable_hr=True, hr_scale=2, hr_upscaler="Lanczos", denoising_strength=0.7))
    assert found.image.size == (64, 64) and found.info["extra_generation_params"]["Hires upscale"] == "2.0"
    latent = api.txt2img(**ask(enable_hr=True))  # the client's own choice of an upscaler
    assert latent.image.size == (64, 64) and latent.info["extra_generation_params"]["Hires upscaler"] == "Latent"
    assert (values(latent.image) != values(found.image)).any()
    with pytest.raises(RuntimeError, match="Lanczos, Nearest, Latent"):
        api.txt2img(**ask(enable_hr=True, hr_upscaler="ESRGAN_4x"))


def test_lists_options_and_png_info(api):
    assert {"DDIM", "Euler a"} <= set(api.util_get_sampler_names())
    assert {"automatic", "karras"} <= set(api.util_get_scheduler_names())
    assert [one["name"] for one in api.get_upscalers()][:4] == ["None", "Lanczos", "Nearest", "Latent"]
    [title] = api.util_get_model_names()
    assert api.util_get_current_model() == title and title.startswith("tiny-sd [")
    api.util_set_model("tiny")
    api.refresh_checkpoints()
    assert "no checkpoint" in api.set_options({"sd_model_checkpoint": "other"})["detail"]
    assert "CLIP_stop_at_last_layers" in api.set_options({"CLIP_stop_at_last_layers": 2})["detail"]
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    api.util_wait_for_ready()
    drawn = api.txt2img(**ask(prompt="a cat", negative_prompt="dog"))
    read = api.png_info(drawn.image)
    assert read.info == drawn.info["infotexts"][0] and read.parameters["Negative prompt"] == "dog"
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""


def test_progress_is_seen_and_interrupt_ends_the_drawing(api):
    outcome: dict[str, Any] = {}

    def draw(**options: Any) -> None:
        try:
            outcome["found"] = api.txt2img(**ask(**options))
        except RuntimeError as error:
            outcome["error"] = str(error)

    other = webuiapi.WebUIApi(port=int(api.baseurl.split(":")[2].split("/")[0]))
    thread = threading.Thread(target=draw, kwargs={"steps": 149})
    thread.start()
    until(lambda: 0 < other.get_progress()["progress"] < 1)
    seen = other.get_progress()
    assert seen["state"]["job_count"] == 1 and seen["state"]["sampling_steps"] == 149 and seen["eta_relative"] > 0
    other.interrupt()
    thread.join(10)
    assert "interrupted" in outcome.pop("error")
    until(lambda: other.get_progress()["state"]["job_count"] == 0)
    thread = threading.Thread(target=draw, kwargs={"steps": 60, "n_iter": 4})
    thread.start()
    until(lambda: other.get_progress()["state"]["job_no"] >= 1)
    other.interrupt()
    thread.join(20)
    assert 1 <= len(outcome["found"].images) < 4
    assert outcome["found"].info["interrupted"] and "interrupted" in outcome["found"].info["warnings"][-1]


def test_skip_goes_on_with_the_next_round(server, api):
    queue = server.service.pictures.queue
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(api.txt2img(**ask(steps=60, n_iter=3))))
    thread.start()
    until(lambda: queue.progress("").round == 1)
    httpx.post(f"{server.url}/sdapi/v1/skip", json={})
    thread.join(30)
    info = outcome[0].info
    assert info["all_seeds"] == [5, 7] and not info["interrupted"] and "2 pictures" in info["warnings"][-1]


def test_what_is_left_out_is_the_bases_own(server):
    body = {"prompt": "cat", "seed": 1, "steps": 2, "scheduler": "automatic"}
    info = json.loads(httpx.post(f"{server.url}/sdapi/v1/txt2img", json=body).json()["info"])
    [own] = server.generator.draw([PictureRequest("cat", seed=1, steps=2)])
    assert info["infotexts"] == [own.infotext] and (info["width"], info["height"]) == own.image.size


def test_openai_draws_the_same_and_names_adapters_in_model(server, api, client):
    options = {"steps": STEPS, "guidance": 3.0, "seed": 5}
    reply = client.images.generate(prompt="a cat", size="32x32", n=2, extra_body=options)
    pictures = [Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in reply.data]
    expected = api.txt2img(**ask(prompt="a cat", batch_size=2))
    assert [apart(*pair) for pair in zip(pictures, expected.images, strict=True)] == [0, 0]
    assert reply.size == "32x32" and reply.data[1].model_extra["seed"] == 6
    named = client.images.generate(
        prompt="a cat", model="tiny-sd+ink:0.5", response_format="b64_json", size="32x32", extra_body=options
    )
    tagged = api.txt2img(**ask(prompt="a cat <lora:ink:0.5>"))
    assert apart(Image.open(io.BytesIO(base64.b64decode(named.data[0].b64_json))), tagged.image) == 0
    assert {"tiny-sd", "ink", "oil"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("ink").model_extra["parent"] == "tiny-sd"


def test_openai_edits_where_the_mask_is_transparent(api, client, stock):
    first = drawn_by(stock, height=32, width=32)
    holed = first.convert("RGBA")
    holed.putalpha(Image.fromarray(np.pad(np.zeros((16, 16), np.uint8), 8, constant_values=255)))
    files = {"image": ("image.png", png(first)), "mask": ("mask.png", png(holed))}
    options = {"steps": STEPS, "guidance": 3.0, "seed": 5}
    reply = client.images.edit(prompt="a cat", **files, extra_body=options)
    found = values(Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json))))
    changed = (found != values(first)).any(-1)
    assert changed[8:24, 8:24].mean() > 0.8 and changed.sum() == changed[8:24, 8:24].sum()
    whole = client.images.edit(prompt="a cat", image=[("a.png", png(first))], extra_body={**options, "strength": 0.7})
    expected = api.img2img([first], denoising_strength=0.7, **ask(prompt="a cat"))
    assert apart(Image.open(io.BytesIO(base64.b64decode(whole.data[0].b64_json))), expected.image) == 0


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("page", ["serving-pictures.md", "serving-pictures.ja.md"])
def test_the_guides_code_runs_as_it_stands(server, tmp_path, monkeypatch, page):
    tree, components = server.library.root.parent / "Lora", components_of(server.generator)
    write_lora(tree / "lineart.safetensors", components, 6)
    text = (Path(__file__).parents[2] / "docs/guide" / page).read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    here = {"8000": str(server.port), "emoji-sd": "tiny-sd", "steps=20": "steps=3", '"steps": 20': '"steps": 3'}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        code = block
        for before, after in here.items():
            code = code.replace(before, after)
        exec(compile(code, page, "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"cat.png", "sad.png", "cat-0.png", "cat-1.png"}
    table = re.split(r"\n## ", text)[2]
    named = set(re.findall(r"`(\w+)`", table))
    known = {*Img2ImgFields.model_fields, *Txt2ImgFields.model_fields}
    assert known - named == set()
    assert {*Img2ImgFields.without_effect, *Txt2ImgFields.without_effect} <= named
