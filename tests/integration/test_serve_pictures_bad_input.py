"""What the server for pictures refuses, how it says so, and that it goes on: every reply is a sentence and no path."""

import base64
import http.client
import io
import json
import re
import shutil
import struct
import threading
import time
import zlib
from typing import Any

import httpx
import pytest
from PIL import Image, PngImagePlugin

from haori.images.generation import PictureGenerator
from haori.images.queue import PictureQueue
from haori.server import KeyStore
from tests.diffusion_pipelines import saved, stable_diffusion_xl
from tests.picture_server import drawing_server, tiny_generator, write_lora
from tests.server_samples import until

SMALL = {"prompt": "cat", "steps": 2, "width": 32, "height": 32, "seed": 1}


class Gated(PictureGenerator):
    """A generator that waits for a gate before it draws, and keeps account of what it drew."""

    gate: threading.Event
    begun: list[str]

    def draw(self, requests: Any, on_step: Any = None) -> Any:
        assert self.gate.wait(30)
        self.begun += [request.prompt for request in requests]
        return super().draw(requests, on_step)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: Any) -> Any:
    made = tiny_generator(tmp_path_factory.mktemp("bad"), Gated)
    made.gate, made.begun = threading.Event(), []
    made.gate.set()
    return made


@pytest.fixture(scope="module")
def server(generator: Any, tmp_path_factory: Any) -> Any:
    with drawing_server(generator, tmp_path_factory.mktemp("home"), max_queue=128) as running:
        yield running


def post(server: Any, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=30, **options)


def refused(server: Any, reply: httpx.Response, status: int, sentence: str) -> None:
    """Check that a reply is a refusal in the web UI's shape which tells no path, and that the server goes on."""
    body = reply.json()
    assert (reply.status_code, set(body)) == (status, {"error", "detail", "body", "errors"}), body
    assert re.search(sentence, body["detail"]) and body["errors"] == body["detail"], body["detail"]
    assert len(body["detail"]) < 1500
    assert str(server.library.root.parent) not in reply.text and "Traceback" not in reply.text
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("prompt", "status", "sentence"),
    [
        ("a " * 5000, 400, "10,000 characters"),
        ("a cat " * 60, 400, "longer than the base reads"),
        ("<lora:ink:nan>", 400, "'nan' where a number"),
        ("<lora:ink:inf>", 400, "'inf' where a number"),
        ("<lora:ink:1e9>", 400, "strength 1e\\+09"),
        ("<lora:<lora:ink:1>:1>", 400, "has a '<' inside"),
        ("<lora:ink:1", 400, "not closed"),
        ("<lycro:ink:1>", 400, "unknown kind of network 'lycro'; did you mean 'lyco'"),
        ("<hypernet:ink:1>", 400, "hypernetwork"),
        ("<lora:nobody:1>", 404, "no adapter 'nobody'"),
        ("<lora:../../etc/passwd:1>", 404, "no adapter"),
        ("<lora:/etc/passwd:1>", 404, "no adapter"),
        ("cat\u0007", 400, "control characters"),
    ],
)
def test_prompts_that_cannot_be_drawn(server, prompt, status, sentence):
    refused(server, post(server, "/sdapi/v1/txt2img", {**SMALL, "prompt": prompt}), status, sentence)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"width": 33}, "divide by 8; the nearest size is 32 x 32"),
        ({"width": 0}, "divide by 8"),
        ({"width": -32}, "divide by 8"),
        ({"width": 4096, "height": 4096}, "draws 16,384 at most"),
        ({"enable_hr": True, "hr_scale": 8}, "draws 16,384 at most"),
        ({"enable_hr": True, "hr_prompt": "dog"}, "'hr_prompt' cannot differ"),
        ({"enable_hr": True, "hr_resize_x": 64, "hr_resize_y": 96}, "both sides grow by one factor"),
        ({"steps": 151}, "151 steps.*150 at most"),
        ({"steps": 0}, "number of steps"),
        ({"batch_size": 5, "n_iter": 5}, "25 pictures.*may have 16"),
        ({"cfg_scale": 1e9}, "guidance"),
        ({"seed": -7}, "seed is -7"),
        ({"seed": "many"}, "'seed' cannot be 'many'"),
        ({"sampler_name": "Restart"}, "no counterpart"),
        ({"sampler_name": "Eulr"}, "did you mean 'euler'"),
        ({"scheduler": "Karas"}, "schedule type 'Karas'"),
        ({"sampler_name": "Euler a", "eta": 0.5}, "'eta' cannot be 0.5"),
        ({"subseed_strength": 0.3}, "'subseed_strength' is not supported"),
        ({"restore_faces": True}, "'restore_faces' is not supported"),
        ({"script_name": "x/y plot"}, "'script_name' is not supported"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"image": ""}]}}}, "no script 'ControlNet'"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "no checkpoint 'other'"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "cannot be '2'"),
        ({"save_images": True}, "'save_images' is not supported"),
        ({"promt": "dog"}, "no field 'promt'; did you mean 'prompt'"),
    ],
)
def test_fields_that_cannot_be_used(server, fields, sentence):
    reply = post(server, "/sdapi/v1/txt2img", {**SMALL, **fields})
    refused(server, reply, 404 if "other" in str(fields) else 400, sentence)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"prompt": "\xff"}', b'{"steps": NaN}', b"null"])
def test_bodies_that_are_no_objects(server, body):
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{server.url}/sdapi/v1/txt2img", content=body, headers=headers)
    refused(server, reply, 400, ".")


def test_what_switches_a_field_off_is_taken(server):
    quiet = {
        "styles": [], "subseed": 4, "subseed_strength": 0, "seed_resize_from_h": -1, "restore_faces": False,
        "tiling": None, "s_churn": 0, "s_noise": 1, "script_name": "None", "do_not_save_grid": True,
        "alwayson_scripts": {"ADetailer": {"args": [False]}, "ControlNet": {"args": []}}, "firstphase_width": 0,
        "hr_checkpoint_name": "Use same checkpoint", "override_settings": {"sd_vae": "None"}, "sampler_index": "DDIM",
    }  # fmt: skip
    reply = post(server, "/sdapi/v1/txt2img", {**SMALL, **quiet})
    assert reply.status_code == 200 and json.loads(reply.json()["info"])["warnings"] == []
    assert post(server, "/sdapi/v1/txt2img", {**SMALL, "send_images": False}).json()["images"] == []


@pytest.mark.parametrize("how", [{"strict": False}, {"override_settings": {"strict": False}}])
def test_lenient_draws_without_and_says_so(server, how):
    asked = {**SMALL, "prompt": "cat <lora:nobody:1> <lora:ink:nan>", "restore_faces": True, "foo": 1}
    reply = post(server, "/sdapi/v1/txt2img", {**asked, **how})
    assert reply.status_code == 200, reply.text
    warnings = json.loads(reply.json()["info"])["warnings"]
    for named in ("'restore_faces'", "'foo'", "'nan'", "'nobody'"):
        assert any(named in warning for warning in warnings), (named, warnings)


def b64(image: Any, form: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, form, **options)
    return base64.b64encode(file.getvalue()).decode()


def bomb(width: int, height: int) -> str:
    """Return a PNG of a few kilobytes that says that it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


GREY = Image.new("RGB", (32, 32), "grey")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"init_images": []}, "has 0 pictures"),
        ({"init_images": [b64(GREY)] * 2}, "has 2 pictures"),
        ({"init_images": ["http://127.0.0.1/x.png"]}, "is no base64; send the picture itself"),
        ({"init_images": ["aGVsbG8="]}, "no picture in a format"),
        ({"init_images": [bomb(30_000, 30_000)]}, "pixels"),
        ({"init_images": [bomb(60_000, 60_000)]}, "pixels"),
        ({"init_images": [b64(GREY)[:100]]}, "broken|no base64|no picture"),
        ({"mask": b64(Image.new("L", (16, 16), 255))}, "mask has 16 x 16 pixels and the picture 32 x 32"),
        ({"mask": b64(Image.new("L", (32, 32), 0))}, "no white part"),
        ({"mask": b64(Image.new("L", (32, 32), 255)), "inpainting_fill": 2}, "latent noise"),
        ({"resize_mode": 3}, "'resize_mode' cannot be 3"),
        ({"denoising_strength": 0}, "strength is 0"),
        ({"denoising_strength": 1.5}, "strength is 1.5"),
        ({"denoising_strength": 0.1}, "leaves none of 2 steps"),
        ({"width": 100_000, "height": 100_000}, "too large"),
        ({"initial_noise_multiplier": 0.5}, "not supported"),
    ],
)
def test_pictures_that_cannot_be_used(server, fields, sentence):
    reply = post(server, "/sdapi/v1/img2img", {**SMALL, "init_images": [b64(GREY)], **fields})
    refused(server, reply, 400, sentence)


def test_hostile_texts_in_pictures(server):
    def told(text: str, **options: Any) -> httpx.Response:
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", text, **options)
        return post(server, "/sdapi/v1/png-info", {"image": b64(GREY, pnginfo=info)})

    odd = told('x\nSteps: 20, Sampler: <script>alert(1)</script>, Steps: 1, "unclosed: \\')
    assert odd.status_code == 200 and odd.json()["parameters"] == {} and "Steps" in odd.json()["warnings"][0]
    assert told("only a prompt").json()["info"] == "only a prompt"
    refused(server, told("x" * 70_000), 400, "70,000 characters")
    refused(server, told("\0" * (80 << 20), zip=True), 400, "no PNG file that can be read")
    refused(server, post(server, "/sdapi/v1/png-info", {"image": bomb(60_000, 60_000)}), 400, "PNG file|pixels")
    refused(server, post(server, "/sdapi/v1/png-info", {"image": b64(GREY, "JPEG")}), 400, "no PNG")


def test_a_body_too_large_is_refused_before_it_is_read(tmp_path, generator):
    with drawing_server(generator, tmp_path, max_body_bytes=10_000) as small:
        reply = post(small, "/sdapi/v1/img2img", {"init_images": ["A" * 20_000]})
        refused(small, reply, 413, "10000 are read")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not complete"),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "no name"),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\ncat\r\n--b', "not complete"),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\ncat\r\n--b--\r\n', "0 pictures"),
        (b'--b\r\nContent-Disposition: form-data; name="etc"; filename="x"\r\n\r\ncat\r\n--b--\r\n', "no file 'etc'"),
    ],
)
def test_forms_that_cannot_be_read(server, content, sentence):
    headers = {"content-type": "multipart/form-data; boundary=b"}
    reply = httpx.post(f"{server.url}/v1/images/edits", content=content, headers=headers)
    assert reply.status_code == 400 and re.search(sentence, reply.json()["error"]["message"]), reply.text


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"response_format": "url"}, 400, "response_format"),
        ({"size": "33x32"}, 400, "divide by 8"),
        ({"size": "big"}, 400, "'size'"),
        ({"model": "nobody"}, 404, "nobody"),
        ({"model": "ink:nan"}, 400, "no model name"),
        ({"model": "tiny-sd:0.5"}, 400, "without a strength"),
        ({"stream": True}, 400, "stream"),
        ({"background": "transparent"}, 400, "background"),
        ({"n": 17}, 400, "17 pictures"),
    ],
)
def test_openai_gets_errors_in_its_own_shape(server, fields, status, named):
    reply = post(server, "/v1/images/generations", {"prompt": "cat", "size": "32x32", "steps": 2, **fields})
    error = reply.json()["error"]
    assert reply.status_code == status and named in error["message"] and set(error) == {
        "message", "type", "param", "code",
    }, error  # fmt: skip


def test_an_adapter_of_another_base_names_both(server, tmp_path):
    from haori.bases import find_base
    from haori.bases.diffusion import pipeline_of

    other = pipeline_of(find_base(str(saved(stable_diffusion_xl(), tmp_path / "xl"))), dtype="fp32", device="cpu")
    tree = server.library.root.parent / "Lora"
    names = ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",)
    write_lora(tree / "big.safetensors", {"unet": other.unet}, 7, names=names)
    reply = post(server, "/sdapi/v1/txt2img", {**SMALL, "prompt": "<lora:big:1>"})
    refused(server, reply, 400, "'big' was not made for the base 'tiny-sd'")


def test_a_mounted_folder_that_vanishes_is_named_and_nothing_else_stops(server, tmp_path):
    tree = server.library.root.parent / "Lora"
    away = tree.rename(tmp_path / "away")
    try:
        reply = post(server, "/sdapi/v1/txt2img", {**SMALL, "prompt": "<lora:ink:1>"})
        refused(server, reply, 404, "mounted folder 'Lora' is not there")
        assert httpx.get(f"{server.url}/sdapi/v1/loras").json() == []
        assert "not there" in post(server, "/sdapi/v1/refresh-loras", {}).json()["warnings"][0]
        assert post(server, "/sdapi/v1/txt2img", SMALL).status_code == 200
    finally:
        shutil.move(away, tree)
    assert post(server, "/sdapi/v1/txt2img", {**SMALL, "prompt": "<lora:ink:1>"}).status_code == 200


def test_of_100_clients_50_hang_up_and_the_others_get_their_pictures(server, generator):
    """The gate is shut until the 50 are gone, so that none of theirs may be drawn, but the one that was begun."""
    generator.gate.clear()
    generator.begun.clear()
    replies: dict[int, dict[str, Any]] = {}
    leaving = threading.Event()

    def ask(number: int) -> None:
        body = {**SMALL, "prompt": f"cat {number}", "seed": number, "sampler_name": "DDIM"}
        if number % 2:
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            connection.request("POST", "/sdapi/v1/txt2img", json.dumps(body), {"content-type": "application/json"})
            assert leaving.wait(60)
            connection.close()
        else:
            replies[number] = httpx.post(f"{server.url}/sdapi/v1/txt2img", json=body, timeout=60).json()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: sum(server.service.pictures.queue.status()) == 100, 30)
        began = time.perf_counter()
        assert httpx.get(f"{server.url}/sdapi/v1/progress").json()["state"]["job_count"] == 100
        assert time.perf_counter() - began < 1.0  # the event loop is free
        leaving.set()
        until(lambda: sum(server.service.pictures.queue.status()) <= 51, 20)
    finally:
        leaving.set()
        generator.gate.set()
    for thread in threads:
        thread.join(60)
    assert sorted(replies) == list(range(0, 100, 2))
    of_the_dead = [prompt for prompt in generator.begun if int(prompt.split()[1]) % 2]
    assert len(of_the_dead) <= 1 and len(generator.begun) <= 51
    until(lambda: server.service.pictures.queue.status() == (0, 0))
    for number in (0, 42, 98):
        body = {**SMALL, "prompt": f"cat {number}", "seed": number, "sampler_name": "DDIM"}
        assert post(server, "/sdapi/v1/txt2img", body).json()["images"] == replies[number]["images"]


def test_a_full_queue_says_when_to_come_again(tmp_path, generator):
    generator.gate.clear()
    with drawing_server(generator, tmp_path, max_queue=2) as small:
        queue: PictureQueue = small.service.pictures.queue
        threads = []
        for waiting in range(3):
            threads.append(threading.Thread(target=post, args=(small, "/sdapi/v1/txt2img", SMALL)))
            threads[-1].start()
            until(lambda wanted=waiting: queue.status() == (1, wanted))
        try:
            reply = post(small, "/sdapi/v1/txt2img", SMALL)
            refused(small, reply, 429, "2 drawings are waiting")
            assert int(reply.headers["retry-after"]) >= 1
        finally:
            generator.gate.set()
        for thread in threads:
            thread.join(20)


def test_a_key_opens_what_it_names_and_interrupts_its_own(tmp_path, generator):
    keys = KeyStore(tmp_path / "keys.json")
    secrets = {
        name: keys.create(name, adapters=adapters, max_concurrent=most).secret
        for name, adapters, most in (("artist", ("tiny-sd", "ink", "Lora/ink"), 2), ("all", ("*",), None))
    }
    with drawing_server(generator, tmp_path, host="0.0.0.0") as closed:

        def ask(name: str, prompt: str, **fields: Any) -> httpx.Response:
            # As the web UI's clients do: any name, and the key as password.
            return post(closed, "/sdapi/v1/txt2img", {**SMALL, "prompt": prompt, **fields}, auth=("me", secrets[name]))

        reply = post(closed, "/sdapi/v1/txt2img", SMALL)
        assert (reply.status_code, reply.json()["error"]) == (401, "missing_api_key")
        assert ask("artist", "<lora:ink:1>").status_code == 200
        for hidden in ("oil", "nobody", "Lora/styles/oil"):
            assert ask("artist", f"<lora:{hidden}:1>").status_code == 403
        assert "may have 2 at once" in ask("artist", "cat", batch_size=3).json()["detail"]
        listed = httpx.get(f"{closed.url}/sdapi/v1/loras", headers={"Authorization": f"Bearer {secrets['artist']}"})
        assert [entry["name"] for entry in listed.json()] == ["ink"]
        assert ask("all", "<lora:oil:1>").status_code == 200
        assert not any(secret in closed.log.getvalue() for secret in secrets.values())
        outcome: list[int] = []
        thread = threading.Thread(target=lambda: outcome.append(ask("all", "cat", steps=120).status_code))
        thread.start()
        until(lambda: closed.service.pictures.queue.progress("").step > 0)
        httpx.post(f"{closed.url}/sdapi/v1/interrupt", auth=("me", secrets["artist"]))
        progress = httpx.get(f"{closed.url}/sdapi/v1/progress", auth=("me", secrets["artist"])).json()
        assert progress["progress"] == 0.0
        thread.join(30)
        assert outcome == [200]


def test_what_runs_is_finished_before_the_server_ends(tmp_path, generator):
    with drawing_server(generator, tmp_path) as ending:
        outcome: list[int] = []
        ask = {**SMALL, "steps": 100}
        thread = threading.Thread(target=lambda: outcome.append(post(ending, "/sdapi/v1/txt2img", ask).status_code))
        thread.start()
        until(lambda: ending.service.pictures.queue.progress("").step > 0)
        drained: list[bool] = []
        drain = threading.Thread(target=lambda: drained.append(ending.service.drain()))
        drain.start()
        until(lambda: ending.service.state == "draining")
        reply = post(ending, "/sdapi/v1/txt2img", SMALL)
        assert (reply.status_code, reply.json()["error"]) == (503, "draining")
        drain.join(30)
        thread.join(30)
        assert (drained, outcome) == ([True], [200])


def test_pages_of_other_origins_cannot_have_it_draw(server):
    for origin, status in (
        (server.url, 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1:1", 403),
    ):
        assert post(server, "/sdapi/v1/interrupt", {}, headers={"origin": origin}).status_code == status, origin


def test_masks_that_are_large_or_whole_take_no_time(server):
    """The fill's widest blur and the softest edge on the largest picture that is taken with a mask of all of it."""
    side = 2048
    noise = Image.effect_noise((side, side), 90).convert("RGB")
    mask = Image.new("L", (side, side), 255)
    fields = {"init_images": [b64(noise, "JPEG")], "mask": b64(mask), "mask_blur": 64}
    began = time.perf_counter()
    assert post(server, "/sdapi/v1/img2img", {**SMALL, **fields}).status_code == 200
    assert time.perf_counter() - began < 25
    refused(server, post(server, "/sdapi/v1/img2img", {**SMALL, **fields, "mask_blur": 65}), 400, "mask_blur")


def test_the_document_describes_every_route(server):
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/v1/images/generations", "/v1/images/edits"} <= set(
        document["paths"]
    )
    assert "/v1/chat/completions" not in document["paths"]
    assert all(operation["summary"] for methods in document["paths"].values() for operation in methods.values())
