"""`haori serve` as a process: a text base and an image base together, and what it refuses at the start."""

import base64
import io
from pathlib import Path
from typing import Any

import openai
import webuiapi
from PIL import Image

from haori.bases import find_base
from haori.bases.diffusion import pipeline_of
from haori.library import import_adapter
from tests.command_line import haori
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.picture_server import CHANGED, tiny_base, write_lora
from tests.serving_process import said, serving


def test_one_process_writes_and_draws(tiny_base_folder: Path, tmp_path: Path):
    image_base = saved(stable_diffusion(), tmp_path / "tiny-sd")
    with serving("--base", tiny_base_folder, "--base", image_base) as (process, url, _):
        text = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        names = [model.id for model in text.models.list()]
        assert names == [find_base(str(tiny_base_folder)).name, "tiny-sd"]
        answer = text.completions.create(model=names[0], prompt="hello", max_tokens=3, temperature=0)
        assert answer.usage.completion_tokens == 3
        api = webuiapi.WebUIApi(port=int(url.rsplit(":", 1)[1]), sampler="DDIM", steps=2)
        drawn = api.txt2img(prompt="cat", seed=1, width=32, height=32).image
        options = {"steps": 2, "seed": 1, "guidance": 7.0}
        reply = text.images.generate(prompt="cat", model="tiny-sd", size="32x32", extra_body=options)
        same = Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json)))
        assert same.tobytes() == drawn.tobytes()
        process.terminate()
        assert process.wait(20) == 0, said(process)
        assert "requests are answered" in said(process)


def test_what_cannot_be_served_is_refused(tiny_base_folder: Path, tmp_path: Path, capsys: Any):
    for name in ("one", "two"):
        saved(stable_diffusion(), tmp_path / name)
    found = haori(capsys, "serve", "--port", "0", "--base", tmp_path / "one", "--base", tmp_path / "two")
    assert found.code == 2 and "'one' and 'two' are image bases" in " ".join(found.err.split())
    found = haori(capsys, "serve", "--port", "0", "--base", tmp_path / "one", "--picture-size", "big")
    assert found.code == 2 and "1024x1024" in found.err
    found = haori(capsys, "serve", "--port", "0", "--base", tmp_path / "one", "--weights", "int8")
    assert found.code == 2 and "--weights is for a text base" in found.err
    found = haori(capsys, "serve", "--port", "0", "--base", tiny_base_folder, "--lenient")
    assert found.code == 2 and "--lenient is for an image base" in found.err


def test_generate_takes_the_base_that_the_adapter_was_made_on(tmp_path: Path, capsys: Any):
    base = tiny_base(tmp_path)
    parts = {"unet": pipeline_of(base, dtype="fp32", device="cpu").unet}
    file = write_lora(tmp_path / "ink.safetensors", parts, 1, 0.05, names=CHANGED[:2])
    import_adapter(file, base, name="ink")
    options = ("--steps", 2, "--seed", 1, "--size", "32x32")
    for at, given in enumerate(((), ("--base", tmp_path / "tiny-sd"))):
        found = haori(capsys, "generate", "cat <lora:ink:0.7>", *given, *options, "--out", tmp_path / str(at))
        assert found.code == 0, found.err
    pictures = [(tmp_path / name / "00000-1.png").read_bytes() for name in ("0", "1")]
    assert pictures[0] == pictures[1]
    found = haori(capsys, "generate", "cat", *options)
    assert found.code == 2 and "--base" in found.err
