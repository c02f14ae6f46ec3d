"""A server that draws with a tiny pipeline of the shape of SD 1.5, on a free port of loopback, and its adapters."""

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haori.bases import find_base
from haori.images.adapters import PictureAdapters
from haori.images.generation import PictureGenerator
from haori.library import Library
from haori.server import (
    Access,
    AccessLog,
    KeyStore,
    PictureSettings,
    RunningServer,
    ServerSettings,
    Service,
    create_app,
    listen,
)
from haori.server.pictures.opening import attach_generator
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.mixed_files import Written

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
CHANGED = (f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn2.to_v", "text_encoder.encoder.layers.0.self_attn.q_proj")


def tiny_base(folder: Path) -> Any:
    """Return a tiny pipeline of SD 1.5's kind, found in a folder called `tiny-sd`."""
    return find_base(str(saved(stable_diffusion(), folder / "tiny-sd")))


def write_lora(
    path: Path, components: Any, seed: int, size: float = 0.7, *, names: Any = CHANGED, **metadata: str
) -> Path:
    """Write a kohya file that changes the UNet and the text encoder."""
    written = Written(seed, size)
    for name in names:
        component, _, module = name.partition(".")
        written.lora(name, components[component].get_submodule(module))
    return written.save(path, **metadata)


def write_tree(folder: Path, components: Any) -> Path:
    """Write `models/Lora` with a category, a sidecar, a preview and a file with an alias."""
    from PIL import Image

    tree = folder / "Lora"
    write_lora(tree / "ink.safetensors", components, 1, ss_output_name="ink_by_trainer")
    write_lora(tree / "styles" / "oil.safetensors", components, 2)
    # What the UNet alone has is read by diffusers too.
    write_lora(tree / "line.safetensors", components, 5, 1.5, names=CHANGED[:2])
    sidecar = {"activation text": "oil paint", "preferred weight": 0.6, "notes": "soft", "sd version": "SD1"}
    (tree / "styles" / "oil.json").write_text(json.dumps(sidecar))
    Image.new("RGB", (4, 4), "red").save(tree / "styles" / "oil.preview.png")
    return tree


@dataclass
class Drawing:
    """A running server."""

    url: str
    port: int
    service: Service
    generator: PictureGenerator
    log: io.StringIO
    library: Library


def components_of(generator: PictureGenerator) -> dict[str, Any]:
    return {"unet": generator.pipeline.unet, "text_encoder": generator.pipeline.text_encoder}


@contextmanager
def drawing_server(
    generator: PictureGenerator, home: Path, *, host: str = "127.0.0.1", **settings: Any
) -> Iterator[Drawing]:
    """Run a real server in a thread; `host` is what it believes to be bound to."""
    log = io.StringIO()
    limits = PictureSettings(**{"max_pixels": 128 * 128, **settings})
    service = Service(
        generator.base, ServerSettings(), AccessLog("json", log), drawing=generator.base, picture_settings=limits
    )
    service.attach(pictures=attach_generator(service, generator))
    access = Access(KeyStore(home / "keys.json"), host)
    taken = listen("127.0.0.1", 0)
    server = RunningServer(create_app(service, access), service)
    thread = threading.Thread(target=server.serve_on, args=(taken,), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = taken.getsockname()[1]
    try:
        yield Drawing(f"http://127.0.0.1:{port}", port, service, generator, log, generator.adapters.library)
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def tiny_generator(folder: Path, kind: type[PictureGenerator] = PictureGenerator) -> PictureGenerator:
    """Return a generator on the tiny base whose library has the tree of `write_tree` mounted."""
    made = kind(tiny_base(folder))
    components = components_of(made)
    library = Library(folder / "library")
    library.mounts.add(write_tree(folder, components))
    made.adapters = PictureAdapters(components, made.base, library=library)
    return made
